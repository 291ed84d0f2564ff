"""What stands around the package agrees with it: dependencies, make targets, scripts, the guide for
contributors."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import sys
import tomllib
from importlib import metadata

import pytest
import train_domains
import train_zoo

import expertsteer_lens.zoo
from expertsteer_lens.zoo import domains

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "expertsteer_lens"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_lowest_versions_are_those_that_the_package_declares():
    lines = [
        line for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "==" in line
    ]
    pinned = dict(line.split("==") for line in lines)
    extras = PROJECT["project"]["optional-dependencies"]
    declared = [*PROJECT["project"]["dependencies"]]
    declared += [d for extra in ("plot", "cli", "export") for d in extras[extra]]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", d).groups() for d in declared)

    def version(text: str) -> list[int]:
        parts = [int(part) for part in text.split(".")]
        return parts + [0] * (3 - len(parts))

    assert {canonical(n) for n in bounds} == set(pinned)
    for name, bound in bounds.items():
        assert version(pinned[canonical(name)]) == version(bound), name


def test_every_development_tool_but_those_of_notebooks_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines}
    dev = PROJECT["project"]["optional-dependencies"]["dev"]
    names = {canonical(re.match(r"[\w-]+", d)[0]) for d in dev} - {"expertsteer-lens"}
    assert names <= pinned


def test_every_step_of_the_script_runs_in_the_workflow_too_and_exists():
    script = set(re.findall(r"\bmake ([a-z0-9-]+)", (ROOT / ".ci" / "run").read_text()))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    hosted = set(re.findall(r"\bmake ([a-z0-9-]+)", workflow))
    assert script <= hosted <= TARGETS
    for python in re.findall(r"Python :: (3\.\d+)", str(PROJECT["project"]["classifiers"])):
        assert f'python: "{python}"' in workflow
    for constraints in re.findall(r"constraints[-\w]*\.txt", workflow):
        assert (ROOT / constraints).is_file()


def test_the_source_distribution_holds_what_stands_beside_the_package():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    missing = [path for path in included if not list(ROOT.glob(path.lstrip("/")))]
    assert not missing
    expected = {"tests", "docs", "notebooks", "benchmarks", "tools", "Makefile", "README.md"}
    assert {f"/{name}" for name in expected} <= set(included)


COMES_WITH = {"cloudpickle": "nnsight", "greenlet": "nnsight", "pyarrow": "datasets"}
"""Packages that are needed only beside another, which requires them."""
CALLED = {"sklearn": "scikit-learn"}


def imported() -> set[str]:
    """Distributions that the package imports, wherever in a file."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module))
    roots = {name.partition(".")[0] for name in found}
    third = roots - set(sys.stdlib_module_names) - {"expertsteer_lens"}
    return {canonical(CALLED.get(name, name)) for name in third}


def required(declared: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", d)[0]) for d in declared}


def test_whatever_is_imported_is_declared_and_whatever_is_declared_is_imported():
    extras = PROJECT["project"]["optional-dependencies"]
    users = [d for extra in ("plot", "cli", "export") for d in extras[extra]]
    declared = required([*PROJECT["project"]["dependencies"], *users])
    assert imported() - declared == set(COMES_WITH)
    assert declared <= imported()
    for name, giver in COMES_WITH.items():
        assert name in required(metadata.requires(giver) or [])


def readme_of_the_index() -> str:
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert [f["path"] for f in hook["fragments"]] == ["README.md"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for change in hook["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    return text


def test_the_readme_of_the_package_index_leads_to_nothing_that_is_not_there():
    text = readme_of_the_index()
    links = re.findall(r"\]\(([^)]*)\)", text) + re.findall(r"(?:src|href)=\"([^\"]*)", text)
    assert "https://arxiv.org/abs/2505.12313" in links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "](docs/" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert PROJECT["project"]["urls"]["Paper"] in links


def test_the_wheel_is_the_package_and_nothing_beside_it():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": [PACKAGE.name]}
    assert not list(PACKAGE.rglob("train*.py"))


@pytest.mark.parametrize(
    ("script", "package"), [(train_zoo, expertsteer_lens.zoo), (train_domains, domains)]
)
def test_the_models_say_by_which_script_and_recipe_they_were_made(script, package):
    folder = pathlib.Path(package.__file__).parent / "models"
    assert folder == script.MODELS_DIR
    assert {p.name for p in folder.iterdir()} == set(script.RECIPES)
    for name in script.RECIPES:
        facts = json.loads((folder / name / "recipe.json").read_text())["measured"]
        path = pathlib.Path(script.__file__).relative_to(ROOT).as_posix()
        assert facts["command"] == f"python {path} --model {name}"
        assert facts["command"] in (folder / name / "README.md").read_text()


def test_the_paths_that_the_guide_names_exist():
    paths = re.findall(r"`((?:expertsteer_lens|tests|docs|tools|\.ci|\.github)/[^`]+)`", GUIDE)
    assert len(paths) > 15
    missing = [p for p in paths if "<" not in p and not (ROOT / p).exists()]
    assert not missing


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(register_\w+)`", GUIDE))))
def test_the_tables_that_the_guide_names_can_be_added_to(name):
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    assert any(f"def {name}(" in source for source in sources)
