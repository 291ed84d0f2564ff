from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError, ExpertSteerError
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.vector import SteeringVector


def unit(seed: int, d: int = 8) -> torch.Tensor:
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def declare_edit(folder: Path, **changes: Any) -> None:
    """Change the fields of `config.json` by hand, and say so."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    config.pop("content_sha256", None)
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not MISSING}))


@pytest.fixture
def plan() -> SteeringPlan:
    vectors = (
        SteeringVector(
            "blocks.1.hook_resid_post",
            unit(0),
            0.25,
            median_norm=3.5,
            provenance={"auc": 0.9, "nan": float("nan")},
        ),
        SteeringVector(
            "blocks.2.hook_resid_post",
            unit(1),
            -1.0,
            relative_to="unit",
            preserve_norm=True,
            gate=Gate(direction=unit(2), threshold=0.5),
        ),
        SteeringVector("blocks.2.hook_resid_post", unit(3), 1.0, relative_to="unit", edit="ablate"),
    )
    return SteeringPlan(
        vectors=vectors,
        positions=slice(1, None),
        basis="centred",
        target={"name": "tiny", "d_model": 8},
        provenance={"seed": 0, "expert": {"name": "teacher"}},
    )


def test_an_edit_is_saved_by_its_name_and_must_be_known_where_it_is_loaded(tmp_path):
    from expertsteer_lens.interventions.edits import EDITS, Edit, register_edit

    def mirror(x, v, coefficient):
        return x - (2 * coefficient * (x @ v))[..., None] * v

    register_edit("mirror", Edit(mirror, coefficient="fraction"))
    try:
        plan = SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": unit(0)}, edit="mirror", relative_to="unit"
        )
        esl.save(plan, tmp_path / "plan")
        assert esl.load(tmp_path / "plan").vectors[0].edit == "mirror"
    finally:
        del EDITS["mirror"]
    with pytest.raises(
        ArtifactError, match=r"edit must be one of .*'mirror'.*must be registered first"
    ):
        esl.load(tmp_path / "plan")


def test_a_plan_survives_saving_bit_for_bit(plan, tmp_path):
    loaded = esl.load(esl.save(plan, tmp_path / "plan"))
    assert loaded.positions == plan.positions
    assert (loaded.basis, loaded.target) == (plan.basis, plan.target)
    assert loaded.provenance == plan.provenance
    for ours, theirs in zip(plan.vectors, loaded.vectors, strict=True):
        assert torch.equal(ours.direction, theirs.direction)
        for name in (
            "hook_name",
            "coefficient",
            "relative_to",
            "median_norm",
            "edit",
            "preserve_norm",
        ):
            assert getattr(ours, name) == getattr(theirs, name), name
    gate = loaded.vectors[1].gate
    assert gate is not None
    assert gate.to_dict() == plan.vectors[1].gate.to_dict()
    assert loaded.vectors[0].provenance == {"auc": 0.9, "nan": None}


@pytest.mark.parametrize(
    "positions", ["all", "generated", 3, (0, 2, 5), slice(None, 4), slice(-2, None, 1)]
)
def test_every_kind_of_positions_survives(plan, tmp_path, positions):
    kept = plan.with_positions(positions)
    assert esl.load(esl.save(kept, tmp_path / "plan")).positions == kept.positions


def test_a_function_as_positions_cannot_be_saved_and_nothing_is_written(plan, tmp_path):
    with pytest.raises(ArgumentError, match="cannot be saved"):
        esl.save(plan.with_positions(lambda step: step), tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_and_leaves_no_litter(plan, tmp_path):
    esl.save(plan, tmp_path / "plan")
    esl.save(plan.with_coefficient(0.5), tmp_path / "plan")
    assert esl.load(tmp_path / "plan").vectors[1].coefficient == 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan"]
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == [
        "README.md",
        "config.json",
        "vectors.safetensors",
    ]


def test_a_folder_with_something_else_in_it_is_not_touched(plan, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a saved plan"):
        esl.save(plan, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_cut_in_half_is_noticed(plan, tmp_path):
    folder = esl.save(plan, tmp_path / "plan")
    tensors = folder / "vectors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"vectors\.safetensors is damaged"):
        esl.load(folder)
    config = folder / "config.json"
    config.write_text(config.read_text()[:100])
    with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
        esl.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version 99, this package reads 1 and 2"),
        ({"format_version": True}, "format_version True, this package reads"),
        ({"format_version": 2.0}, "format_version 2.0, this package reads"),
        ({"kind": "Popen"}, "holds a 'Popen', which this package does not know"),
        ({"basis": "sideways"}, "basis must be 'raw', 'centred' or None"),
        ({"target": 1.0}, "config.json: "),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"positions": {"slices": []}}, "positions must be one of"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(plan, tmp_path, change, message):
    folder = esl.save(plan, tmp_path / "plan")
    declare_edit(folder, **change)
    with pytest.raises(ArtifactError, match=message):
        esl.load(folder)


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ('"coefficient": 0.25', '"coefficient": 0.75'),
        ('"median_norm": 3.5', '"median_norm": 3.6'),
        ('"edit": "ablate"', '"edit": "add"'),
        ('"seed": 0', '"seed": 1'),
        ('"format_version": 2', '"format_version": 1'),
    ],
)
def test_one_changed_digit_is_noticed_and_a_declared_edit_is_taken(plan, tmp_path, find, put):
    folder = esl.save(plan, tmp_path / "plan")
    file = folder / "config.json"
    assert find in file.read_text()
    file.write_text(file.read_text().replace(find, put))
    with pytest.raises(ArtifactError, match=r'was edited.*delete the "content_sha256" entry'):
        esl.load(folder)
    file.write_text(re.sub(r',?\s*"content_sha256": "\w+"', "", file.read_text()))
    loaded = esl.load(folder)
    if "coefficient" in find:
        assert loaded.vectors[0].coefficient == 0.75


def test_indenting_and_reordering_a_file_is_no_edit(plan, tmp_path):
    folder = esl.save(plan, tmp_path / "plan")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7, sort_keys=True))
    assert esl.load(folder).target == plan.target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 2, "format_version": 2}', "'format_version' stands twice"),
        ('{"format_version": NaN}', "NaN is no JSON"),
        ('{"format_version": ' + "[" * 10**5, "damaged"),
        ('{"format_version": 1' + "0" * 5000 + "}", "damaged"),
        ("{}", "no format_version"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        esl.load(tmp_path)


def test_a_tensor_file_that_is_none_is_refused_even_with_its_checksum(plan, tmp_path):
    folder = esl.save(plan, tmp_path / "plan")
    (folder / "vectors.safetensors").write_bytes(b"not tensors")
    digest = hashlib.sha256(b"not tensors").hexdigest()
    declare_edit(folder, vectors_sha256=digest)
    with pytest.raises(ArtifactError, match="is no safetensors file"):
        esl.load(folder)


def test_missing_fields_files_and_bad_vectors_are_named(plan, tmp_path):
    folder = esl.save(plan, tmp_path / "plan")
    config = json.loads((folder / "config.json").read_text())
    declare_edit(folder, basis=MISSING)
    with pytest.raises(ArtifactError, match="lacks the field 'basis'"):
        esl.load(folder)
    config["vectors"][0]["edit"] = "explode"
    declare_edit(folder, basis="centred", vectors=config["vectors"])
    with pytest.raises(ArtifactError, match=r"vectors\[0\] is invalid: edit must be one of"):
        esl.load(folder)
    config["vectors"][0] = {**config["vectors"][1], "gate": {"threshold": 0}}
    declare_edit(folder, vectors=config["vectors"])
    with pytest.raises(ArtifactError, match=r"vectors\[0\] is invalid: "):
        esl.load(folder)
    declare_edit(folder, vectors=[*config["vectors"], config["vectors"][2]])
    with pytest.raises(ArtifactError, match=r"vectors\["):
        esl.load(folder)
    (folder / "vectors.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"vectors\.safetensors is missing"):
        esl.load(folder)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_explained(tmp_path):
    with pytest.raises(ArtifactError, match="neither a folder nor a hub id"):
        esl.load(tmp_path / "nothing")
    for name in ("x" * 5000, "a/" + "x" * 5000, "x" * 5000 + "/a", "x" * 250):
        with pytest.raises(ArtifactError, match="neither a folder nor a hub id") as stop:
            esl.load(name)
        assert len(str(stop.value)) < 400
    with pytest.raises(ArtifactError, match=r"/ is not a saved plan"):
        esl.load("/")


@pytest.mark.parametrize("key", ["format_version", "kind"])
def test_a_message_shows_the_ends_of_a_long_value(plan, tmp_path, key):
    folder = esl.save(plan, tmp_path / "plan")
    declare_edit(folder, **{key: "x" * 200_000})
    with pytest.raises(ArtifactError, match="x" * 50) as stop:
        esl.load(folder)
    assert len(str(stop.value)) < 1000


def test_no_message_is_longer_than_its_longest_length():
    from expertsteer_lens.errors import ArgumentError

    said = str(ArgumentError("begins " + "x" * 200_000 + " ends"))
    assert len(said) < 4100
    assert said.startswith("begins x")
    assert said.endswith("x ends")


def test_the_folder_above_what_was_saved_says_where_it_is(plan, tmp_path):
    """As `fit --out` leaves it: the plan is in OUT/plan."""
    with pytest.raises(ArtifactError, match=r"config\.json is missing\.$"):
        esl.load(tmp_path)
    esl.save(plan, tmp_path / "plan")
    with pytest.raises(ArtifactError, match=r"what was saved is in \S+plan\.$"):
        esl.load(tmp_path)


def test_loading_imports_no_host(plan, tmp_path):
    folder = esl.save(plan, tmp_path / "plan")
    code = (
        f"import sys, expertsteer_lens as e; e.load({str(folder)!r}); "
        "bad = {'transformer_lens', 'nnsight', 'transformers'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_save_is_ours_even_after_nnsight_has_mounted_its_own_on_every_object():
    pytest.importorskip("nnsight")
    import expertsteer_lens.io

    assert esl.save is expertsteer_lens.io.save


def test_errors_are_ours():
    assert issubclass(ArtifactError, ExpertSteerError)
    assert issubclass(ArtifactError, ValueError)


def test_files_may_be_read_by_whom_the_umask_lets(plan, tmp_path):
    before = os.umask(0o027)
    try:
        folder = esl.save(plan, tmp_path / "plan")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("path", ["~/plan", "~"])
def test_a_home_folder_that_no_shell_expanded_is_refused(plan, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"a folder named '~'; give the whole path"):
        esl.save(plan, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate", 0),
        ("gate", False),
        ("preserve_norm", "false"),
        ("preserve_norm", 0),
        ("hook_name", [[]]),
        ("coefficient", "1"),
        ("coefficient", True),
        ("median_norm", "5"),
        ("provenance", []),
    ],
)
def test_a_vector_with_a_field_of_another_type_is_refused(plan, tmp_path, field, value):
    folder = esl.save(plan, tmp_path / "plan")
    config = json.loads((folder / "config.json").read_text())
    config["vectors"][0][field] = value
    declare_edit(folder, vectors=config["vectors"])
    with pytest.raises(ArtifactError, match=rf"vectors\[0\]: {field} must be .*, got"):
        esl.load(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("vectors", {}), ("target", 1.0), ("provenance", []), ("basis", 3)]
)
def test_a_plan_with_a_field_of_another_type_is_refused(plan, tmp_path, field, value):
    folder = esl.save(plan, tmp_path / "plan")
    declare_edit(folder, **{field: value})
    with pytest.raises(ArtifactError, match=rf"config\.json: {field} must be .*, got"):
        esl.load(folder)
