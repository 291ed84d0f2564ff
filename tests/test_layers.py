"""Imports go down only: the folders are the floors, in the order of the table in `docs/inside.md`.

Every import counts, also one inside a function or for type checking. The few functions of
higher floors that are called by name from below are listed in `expertsteer_lens._upward`, each with its reason.
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

from expertsteer_lens._upward import UPWARD
from expertsteer_lens._upward import upward as find_upward
from expertsteer_lens.align.kinds import KINDS
from expertsteer_lens.evaluation import COMPARISONS
from expertsteer_lens.files.export import FORMATS
from expertsteer_lens.hosts.table import HOSTS
from expertsteer_lens.interventions.edits import EDITS
from expertsteer_lens.learn.learners import LEARNERS
from expertsteer_lens.pair import ESTIMATORS, RULES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "expertsteer_lens"
BY_NAME = {
    "_moved": "old module paths",
    "_upward": "what is called from below, listed there",
    "zoo": "the larger half of it, when it is asked for",
    "files": "its own files, when they are asked for",
    "files.codec": "the homes of classes that files name",
    "hosts.table": "one host's file, in the same folder",
}
"""Modules that import others by name, and which."""


def modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its dotted name below it; the package itself is ""."""
    names = {
        p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")
    }
    return {re.sub(r"(^|\.)__init__$", "", name): path for path, name in names.items()}


def room(module: str) -> str:
    """The folder (or the file of the top level) a module belongs to."""
    return module.split(".")[0]


def floors() -> dict[str, int]:
    found: dict[str, int] = {}
    for line in (ROOT / "docs" / "inside.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| (\d+) \| (.*?) \|", line)
        for name in re.findall(r"`(\w+)/?`", row[2]) if row else []:
            assert name not in found, f"{name} stands twice"
            found[name] = int(row[1])
    return found


def imports(name: str, source: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules of ours that are imported anywhere in this source."""
    package = name if is_package else name.rpartition(".")[0]
    out = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            inner = [a.name for a in node.names if a.name.startswith("expertsteer_lens.")]
            out |= {i.removeprefix("expertsteer_lens.") for i in inner}
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            above = [part for part in package.split(".") if part]
            parts = above[: len(above) - node.level + 1]
            base = ".".join([*parts, *([node.module] if node.module else [])])
        elif base.split(".")[0] == "expertsteer_lens":
            base = base.removeprefix("expertsteer_lens").lstrip(".")
        else:
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            out.add(inner if inner in known else base)
    return out - {name, ""}


def all_imports() -> dict[str, set[str]]:
    paths = modules()
    return {
        name: imports(name, path.read_text(encoding="utf-8"), path.stem == "__init__", set(paths))
        for name, path in paths.items()
    }


def upward(floor: dict[str, int], found: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {
        (a, b) for a, those in found.items() for b in those if a and floor[room(b)] > floor[room(a)]
    }


def circles(found: dict[str, set[str]]) -> list[set[str]]:
    """Groups of rooms that reach one another (length two and more)."""
    graph: dict[str, set[str]] = {}
    for a, those in found.items():
        graph.setdefault(room(a), set()).update(room(b) for b in those)
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for following in graph.get(todo.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        reach[start] = seen
    groups = {
        frozenset({a, *(b for b in reach[a] if a in reach.get(b, ()))})
        for a in graph
        if a in reach[a]
    }
    return [set(g) for g in groups if len(g) > 1]


def without(found: dict[str, set[str]], arrows: set[tuple[str, str]]) -> dict[str, set[str]]:
    return {a: {b for b in those if (a, b) not in arrows} for a, those in found.items()}


def test_every_folder_and_top_file_stands_on_a_floor():
    assert set(floors()) == {room(m) for m in modules()} - {""}


def test_imports_go_down_but_for_those_listed_with_a_reason():
    found = {a: those for a, those in all_imports().items() if a}
    assert sum(map(len, found.values())) > 200  # the imports were seen
    assert upward(floors(), found) == set()


def of_the_package(source: str, package: str) -> set[str]:
    """Names that a module takes from the package itself, which stands above every floor; "" where
    it takes the package."""
    out = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out |= {"" for alias in node.names if alias.name == "expertsteer_lens"}
        elif isinstance(node, ast.ImportFrom):
            depth = len([part for part in package.split(".") if part]) + 1
            itself = node.module == "expertsteer_lens" if not node.level else node.module is None
            if itself and node.level in (0, depth):
                rooms = {room(name) for name in modules()}
                out |= {alias.name for alias in node.names} - rooms
    return out


def test_nothing_is_taken_from_the_package_itself_but_its_version():
    taken = {}
    for name, path in modules().items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        if name:
            taken[name] = of_the_package(path.read_text(encoding="utf-8"), package)
    assert {n: t for n, t in taken.items() if t - {"__version__"}} == {}
    assert {"__version__"} in taken.values()  # they were seen
    for source in (
        "from expertsteer_lens import save",
        "def f():\n    import expertsteer_lens as esl",
        "def f():\n    from .. import load",
    ):
        assert of_the_package(source, "low"), source
    assert not of_the_package("from expertsteer_lens import pair", "low")


NAMES_COMPARED = {
    ("hosts.loading", "gguf"): "the package of that name",
    ("hosts.table", "nnsight"): "how its objects are known",
    ("linalg.kernels", "gaussian"): "a kernel, no estimator",
    ("steer.bake", "huggingface"): "only its weights can be saved as a checkpoint",
    ("steer.nnsight_edit", "nnsight"): "an edit of nnsight's own kind",
}
"""Where a module compares a name that stands in a table of variants, and why it may."""


def test_what_a_variant_needs_stands_in_its_table_and_not_elsewhere():
    tables = (KINDS, ESTIMATORS, RULES, EDITS, FORMATS, COMPARISONS, LEARNERS, HOSTS)
    names = {name for table in tables for name in table}
    found = set()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.MatchValue):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                found |= {(module, word) for word in words & names}
    assert found == set(NAMES_COMPARED)


def test_no_circle_reaches_beyond_a_folder():
    found = {a: those for a, those in all_imports().items() if a}
    assert circles(found) == []


def test_what_is_called_upward_is_listed_once_with_its_reason():
    """Names are looked up in one table; nobody else imports a module of ours by name."""
    called = []
    for name, path in modules().items():
        source = path.read_text(encoding="utf-8")
        if name != "_upward":
            called += [(name, what) for what in re.findall(r'\bupward\("(\w+)"\)', source)]
        if "import_module(" in source:
            assert name in BY_NAME, name
    assert {what for _, what in called} == set(UPWARD)
    for what, (module, reason) in UPWARD.items():
        assert callable(find_upward(what))
        assert reason
        callers = [name for name, w in called if w == what]
        assert all(floors()[room(name)] < floors()[room(module)] for name in callers)


def test_an_import_from_above_is_seen_wherever_it_stands():
    known = {"low.a", "high.b", "low", "high"}
    for source in (
        "from expertsteer_lens.high.b import x",
        "def f():\n    from expertsteer_lens.high import b",
        "if TYPE_CHECKING:\n    from ..high.b import T",
        "def f():\n    import expertsteer_lens.high.b",
    ):
        found = {"low.a": imports("low.a", source, False, known)}
        assert upward({"low": 0, "high": 1}, found) == {("low.a", "high.b")}, source


@pytest.mark.parametrize("back", [False, True])
def test_a_circle_would_be_seen(back):
    found = {"a.x": {"b.y"}, "b.z": {"c.w"}, "c.w": {"a.x"} if back else set()}
    assert circles(found) == ([{"a", "b", "c"}] if back else [])
