"""The shapes that the package annotates are checked while the tests run, and our own errors come
first."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re

import jaxtyping
import pytest
import torch
import typechecking
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

import expertsteer_lens as esl
from expertsteer_lens.errors import DataError

ARRAY = re.compile(r"\b(Float|Int|Bool|Shaped|Integer|Num)\[")


@jaxtyped(typechecker=typechecking.checked)
def halves(rows: Float[Tensor, "n d"], *, keep: int = 0) -> Float[Tensor, "n half"]:
    if rows.ndim != 2:
        raise DataError("rows must be a matrix")
    return rows[:, ::2] if keep == 0 else rows[:keep, ::2]


def test_a_wrong_result_and_an_accepted_wrong_argument_fail():
    assert halves(torch.ones(4, 6)).shape == (4, 3)
    with pytest.raises(TypeCheckError, match="n=4"):
        halves(torch.ones(4, 6), keep=2)
    with pytest.raises(TypeCheckError):
        halves(torch.ones(4, 6, dtype=torch.long))


def test_our_own_error_is_not_pre_empted():
    with pytest.raises(DataError, match="rows must be a matrix"):
        halves(torch.ones(4))
    with pytest.raises(DataError, match="activations must be a floating tensor of shape"):
        esl.fit_rfm(torch.ones(4), torch.ones(4))


def annotated(module: str, source: str) -> set[str]:
    """Functions, and constructors of dataclasses, that have an array in their annotations."""
    names = set()

    def holds_array(node: ast.expr | None) -> bool:
        return node is not None and bool(ARRAY.search(ast.unparse(node)))

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                inside = f"{prefix}.{child.name}"
                fields = [n for n in child.body if isinstance(n, ast.AnnAssign)]
                decorators = "".join(map(ast.unparse, child.decorator_list))
                if "dataclass" in decorators and any(holds_array(n.annotation) for n in fields):
                    names.add(f"{inside}.__init__")
                visit(child, inside)
            elif isinstance(child, ast.FunctionDef):
                given = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                if any(map(holds_array, [child.returns, *(a.annotation for a in given)])):
                    names.add(f"{prefix}.{child.name}")

    visit(ast.parse(source), module)
    return names


@pytest.mark.skipif(
    not hasattr(jaxtyping._decorator, "_destring_annotation"),
    reason="this jaxtyping checks no function that has a name for type checkers only in its types",
)
def test_every_function_with_an_array_in_its_signature_is_checked():
    package, expected = pathlib.Path(esl.__file__).parent, set()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        module = ".".join(parts)
        if module in typechecking.modules():
            expected |= annotated(module, path.read_text(encoding="utf-8"))
            importlib.import_module(module)
    assert len(expected) > 80
    assert expected - typechecking.CHECKED == set()
