"""What people import: the names and signatures, their docstrings and reprs, and that no host comes
along uninvited."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import pathlib
import pkgutil
import subprocess
import sys
import textwrap
from itertools import pairwise
from typing import get_args

import models
import pytest
import results
import torch

import expertsteer_lens as esl
from expertsteer_lens._moved import IN_FOLDERS
from expertsteer_lens.align.kinds import AlignerKind
from expertsteer_lens.benchmarks.offline import BenchRow
from expertsteer_lens.evaluation.result import EvaluationRow, Role
from expertsteer_lens.hosts.base import Host
from expertsteer_lens.hosts.table import HOSTS as TABLE_OF_HOSTS
from expertsteer_lens.pair.estimators import EstimatorName
from expertsteer_lens.pair.rules import RuleName

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "public_api.txt"
HOSTS = ("transformer_lens", "nnsight", "transformers")
NAMES = sorted([*esl.__all__, *IN_FOLDERS], key=lambda name: (name in IN_FOLDERS, name))
"""What is public: in the package itself, and in its folders what was there in 0.1."""
CLASSES = [name for name in NAMES if inspect.isclass(getattr(esl, name))]
MODULES = [name for name in NAMES if inspect.ismodule(getattr(esl, name))]


def signature(name: str, thing: object) -> str:
    """Names, kinds and defaults of the parameters; annotations may be made more exact without
    notice."""
    parts, starred = [], False
    for p in inspect.signature(thing).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred = starred or p.kind is p.VAR_POSITIONAL
        prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = ""
        if p.default is not p.empty:
            plain = p.default is None or isinstance(p.default, str | int | float | tuple)
            made = "…" if "FACTORY" in type(p.default).__name__ else f"{type(p.default).__name__}()"
            default = f"={p.default!r}" if plain else f"={made}"
        parts.append(f"{prefix}{p.name}{default}")
    return f"{name}({', '.join(p for p in parts if p not in ('self', 'cls'))})"


def own(thing: object, home: str) -> bool:
    return getattr(thing, "__module__", "").startswith(home)


def public_members(cls: type) -> dict[str, object]:
    """Methods and properties a user is meant to call."""
    out = {}
    for base in reversed(cls.__mro__[:-1]):
        if own(base, "expertsteer_lens"):
            out.update({k: v for k, v in vars(base).items() if not k.startswith("_")})
    kinds = (staticmethod, classmethod, property)
    return {k: v for k, v in out.items() if inspect.isfunction(v) or isinstance(v, kinds)}


def module_members(name: str) -> dict[str, object]:
    module = getattr(esl, name)
    chosen = getattr(module, "__all__", [k for k in vars(module) if not k.startswith("_")])
    found = {k: getattr(module, k) for k in chosen}
    return {
        k: v
        for k, v in found.items()
        if callable(v) and own(v, module.__name__) and getattr(v, "__name__", k) == k
    }


def surface() -> str:
    lines = ["expertsteer_lens: " + ", ".join(esl.__all__)]
    lines += [f"expertsteer_lens.{folder}.{name}" for name, folder in IN_FOLDERS.items()]
    for name in NAMES:
        thing = getattr(esl, name)
        if inspect.isclass(thing):
            lines.append("class " + signature(name, thing))
            for key, member in public_members(thing).items():
                if isinstance(member, property):
                    lines.append(f"    .{key}")
                else:
                    function = (
                        member.__func__
                        if isinstance(member, classmethod | staticmethod)
                        else member
                    )
                    lines.append("    ." + signature(key, function))
        elif callable(thing):
            lines.append(signature(name, thing))
    for name in MODULES:
        lines.append(f"module {name}")
        for key, member in sorted(module_members(name).items()):
            lines.append(
                "    " + (f"class {key}" if inspect.isclass(member) else signature(key, member))
            )
    return "\n".join(lines) + "\n"


def test_names_and_signatures_are_as_recorded():
    """A change here is a change for users: record it with UPDATE_GOLDENS=1 and a line in the
    changelog."""
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(surface(), encoding="utf-8")
    assert surface().splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()


class TestLaziness:
    @staticmethod
    def hosts_after(code: str) -> list[str]:
        """Which hosts a fresh interpreter has loaded after running `code`."""
        report = (
            f"\nimport json, sys\nprint(json.dumps([h for h in {HOSTS!r} if h in sys.modules]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    def test_no_module_but_the_hosts_own_imports_a_host(self):
        import expertsteer_lens.hosts as hosts

        theirs = {m.name for m in pkgutil.walk_packages(hosts.__path__, "expertsteer_lens.hosts.")}
        found = {m.name for m in pkgutil.walk_packages(esl.__path__, "expertsteer_lens.")} - theirs
        assert len(found) > 40
        assert self.hosts_after("import " + ", ".join(sorted(found))) == []

    @pytest.mark.parametrize("name", IN_FOLDERS)
    def test_a_name_that_is_in_a_folder_is_found_there_and_by_its_short_way(self, name):
        code = (
            "import warnings; warnings.simplefilter('error')\nimport expertsteer_lens as esl\n"
            f"assert esl.{IN_FOLDERS[name]}.{name} is esl.{name}\n"
            f"from expertsteer_lens import {name}"
        )
        assert self.hosts_after(code) == []
        assert name not in dir(esl)
        assert name in getattr(esl, IN_FOLDERS[name]).__all__

    def test_every_folder_is_there_without_an_import(self):
        folders = {p.parent.name for p in pathlib.Path(esl.__file__).parent.glob("*/__init__.py")}
        hidden = {"cli", "linalg"}
        assert len(folders) > 12
        for name in sorted(
            folders - hidden
        ):  # each in an interpreter of its own: none needs another
            assert self.hosts_after(f"import expertsteer_lens as esl\nesl.{name}") == []

    def test_every_public_name_can_be_looked_up_without_a_host(self):
        assert (
            self.hosts_after(
                "import expertsteer_lens as esl\n[getattr(esl, n) for n in esl.__all__]"
            )
            == []
        )

    def test_an_import_of_a_host_would_be_seen(self):
        assert self.hosts_after("import expertsteer_lens.hosts.huggingface, transformers") == [
            "transformers"
        ]

    def test_importing_the_package_brings_little_more_than_torch_and_jaxtyping(self):
        """How long that takes says `python benchmarks/import_time.py`."""
        code = (
            "import sys, torch, jaxtyping\nbefore = set(sys.modules)\nimport {}\n"
            "print(*sorted(set(sys.modules) - before))"
        )

        def brought(package: str) -> set[str]:
            done = subprocess.run(
                [sys.executable, "-c", code.format(package)],
                capture_output=True,
                text=True,
                check=True,
            )
            return set(done.stdout.split())

        heavy = {*HOSTS, "plotly", "pandas", "datasets", "sklearn", "scipy", "huggingface_hub"}
        heavy |= {"safetensors", "tqdm", "typer", "rich", "joblib", "tokenizers"}
        found = brought("expertsteer_lens")
        assert not heavy & {name.split(".")[0] for name in found}
        ours = {name.split(".")[1] for name in found if name.startswith("expertsteer_lens.")}
        assert {"files", "errors"} <= ours
        assert not {"hosts", "data", "steer", "learn", "align", "pair", "show", "cli"} & ours
        assert "pandas" in brought("expertsteer_lens, pandas")  # what is brought is seen

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="has no attribute 'fit_rfn'"):
            _ = esl.fit_rfn
        assert set(dir(esl)) == set(esl.__all__)
        with pytest.raises(
            AttributeError, match=r"no attribute 'domain'; it has anchors, .* domains"
        ):
            _ = esl.zoo.domain

    def test_the_benchmark_world_is_part_of_the_zoo(self):
        code = "import expertsteer_lens as esl\nassert len(esl.zoo.domains.tasks()) == 15"
        assert self.hosts_after(code) == []


class TestDocstrings:
    @pytest.mark.parametrize("name", [n for n in NAMES if n != "__version__"])
    def test_every_public_thing_says_what_it_is(self, name):
        thing = getattr(esl, name)
        assert thing.__doc__
        assert not thing.__doc__.startswith(f"{name}("), (
            "a dataclass without a docstring of its own"
        )
        members = (
            public_members(thing)
            if inspect.isclass(thing)
            else module_members(name)
            if name in MODULES
            else {}
        )
        silent = [key for key, member in members.items() if not inspect.getdoc(member)]
        assert not silent

    @pytest.mark.parametrize(
        "name", [n for n in NAMES if callable(getattr(esl, n)) and n not in CLASSES]
    )
    def test_every_parameter_of_a_function_is_explained(self, name):
        function = getattr(esl, name)
        text = inspect.getdoc(function)
        if len(inspect.signature(function).parameters) <= 4:
            return  # short ones are told in prose
        missing = [p for p in inspect.signature(function).parameters if f"{p}:" not in text]
        assert not missing


class TestReprs:
    @pytest.fixture(scope="class")
    def instances(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(40, 6, generator=generator)
        y = (x[:, 0] > 0).float()
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(6)}, relative_to="unit"
        )
        rfm = esl.fit_rfm(x, y, esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0))
        mi, pairs = results.layer_pair_mi(), results.layer_pairs()
        store = esl.ActivationStore({"blocks.0.hook_resid_post": x}, y)
        rows = [
            BenchRow("cure", "medicine", method, role, 1, 0.5, 0.4, 0.6, None, 0.7)
            for method, role in (("unsteered", "base"), ("ExpertSteer (anchored)", "plan"))
        ]
        bench = esl.benchmarks.Bench(tuple(rows), (), {}, 1.0)
        made = [
            store,
            esl.fit_aligner(x, x[:, :4]),
            esl.AlignerConfig(),
            esl.Behaviour(("p",), (" a",), (" b",)),
            results.calibration(),
            esl.ContrastPairs.from_lists(["a", "b"], ["c", "d"]),
            results.evaluation(),
            esl.ExpertSteer(),
            esl.ExpertSteerConfig(),
            mi,
            pairs,
            esl.MIConfig(),
            esl.PairingConfig(),
            rfm,
            esl.RFMConfig(),
            esl.Chat.ask("Why?"),
            plan,
            plan.vectors[0],
            esl.interventions.Gate(direction=torch.ones(6), threshold=0.5),
            bench,
            esl.steer.RunReport(n_forwards=2),
        ]
        return {type(thing).__name__: thing for thing in made}

    @pytest.mark.parametrize("name", [n for n in CLASSES if n not in ("ExpertSteering", "Host")])
    def test_an_object_introduces_itself_in_a_few_lines(self, name, instances):
        shown = repr(instances[name])
        assert "tensor(" not in shown, "a repr is not for dumping numbers"
        assert " object at 0x" not in shown
        assert 10 < len(shown) < 1200
        assert name in shown or name == "SteeringVector"  # which shows as a line of its plan

    def test_reprs_tell_the_facts(self, instances):
        for name, facts in {
            "ActivationStore": ("n=40", "d_model=6"),
            "Aligner": ("6", "4"),
            "ContrastPairs": ("2 pairs",),
            "Behaviour": ("1 prompts",),
            "Calibration": ("0.2", "9 texts"),
            "Evaluation": ("Works",),
            "RFM": ("n=40", "d=6"),
            "LayerPairMI": ("n_samples=77", "3 x 4"),
            "LayerPairs": ("attribution",),
            "SteeringPlan": ("positions='all'",),
            "SteeringVector": ("add +1", "d=6"),
            "Gate": ("0.5",),
            "Bench": ("1 tasks", "70%"),
        }.items():
            assert all(fact in repr(instances[name]) for fact in facts), name

    def test_a_host_says_what_it_is_and_why(self):
        shown = repr(esl.as_host(models.hf("llama"), tokenizer=models.tokenizer()))
        assert "d_model=32" in shown
        assert "because" in shown


def test_configurations_are_keyword_only_frozen_and_survive_json():
    for name in CLASSES:
        cls = getattr(esl, name)
        if not name.endswith("Config"):
            continue
        config = cls()
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(cls)[0].name, None)
        with pytest.raises(TypeError):
            cls("anything")
        json.dumps(config.to_dict())


@pytest.mark.parametrize(
    ("cls", "field", "values"),
    [
        (EvaluationRow, "role", get_args(Role)),
        (Host, "kind", tuple(TABLE_OF_HOSTS)),
        (esl.MIConfig, "estimator", get_args(EstimatorName)),
        (esl.AlignerConfig, "kind", get_args(AlignerKind)),
        (esl.PairingConfig, "rule", get_args(RuleName)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_says_every_value_that_it_may_have(cls, field, values):
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    said = [
        b.value.value
        for a, b in pairwise(tree.body)
        if isinstance(a, ast.AnnAssign) and a.target.id == field and isinstance(b, ast.Expr)
    ]
    assert len(said) == 1
    assert [value for value in values if f'"{value}"' not in said[0]] == []
