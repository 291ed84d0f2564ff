"""Imports go down only: the floors are those of `docs/inside.md`, and every module stands on one."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "expertsteer_lens"


def modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its dotted name below it; the package itself is ""."""
    names = {p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    return {re.sub(r"(^|\.)__init__$", "", name): path for path, name in names.items()}


def floors() -> dict[str, int]:
    found: dict[str, int] = {}
    for line in (ROOT / "docs" / "inside.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| (\d) \| (.*?) \|", line)
        for name in re.findall(r"`([\w.]+)`", row[2]) if row else []:
            assert name not in found, f"{name} stands twice"
            found[name] = int(row[1])
    return found


def imports(name: str, path: pathlib.Path, known: set[str]) -> set[str]:
    """Modules of ours that are imported when this one is loaded."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    out = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            above = [part for part in package.split(".") if part]
            base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
        elif base.split(".")[0] == "expertsteer_lens":
            base = base.removeprefix("expertsteer_lens").lstrip(".")
        else:
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            out.add(inner if inner in known else base)
    return out - {name}


def upward(floor: dict[str, int], found: dict[str, set[str]]) -> list[str]:
    return [f"{a} imports {b}" for a, those in found.items() for b in sorted(those) if a and floor[b] > floor[a]]


def test_every_module_stands_on_a_floor_and_imports_nothing_from_above():
    paths, floor = modules(), floors()
    assert set(floor) == set(paths) - {""}
    found = {name: imports(name, path, set(paths)) for name, path in paths.items()}
    assert upward(floor, found) == []
    assert sum(map(len, found.values())) > 100  # the imports were seen


def test_an_import_from_above_would_be_seen():
    assert upward({"a": 0, "b": 1}, {"a": {"b"}, "b": {"a"}}) == ["a imports b"]
    path = PACKAGE / "hosts" / "huggingface.py"
    seen = imports("hosts.huggingface", path, set(modules()))
    assert {"hosts._base", "errors"} <= seen
    assert "plan" not in seen  # only for type checking
