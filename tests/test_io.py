from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError, ExpertSteerError
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.steer.plan import SteeringPlan, SteeringVector


def unit(seed: int, d: int = 8) -> torch.Tensor:
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


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
        ({"format_version": 99}, "format_version 99, this package reads 1"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"positions": {"slices": []}}, "positions must be one of"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(plan, tmp_path, change, message):
    folder = esl.save(plan, tmp_path / "plan")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ArtifactError, match=message):
        esl.load(folder)


def test_missing_fields_files_and_bad_vectors_are_named(plan, tmp_path):
    folder = esl.save(plan, tmp_path / "plan")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "basis"})
    )
    with pytest.raises(ArtifactError, match="lacks the field 'basis'"):
        esl.load(folder)
    config["vectors"][0]["edit"] = "explode"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"vectors\[0\] is invalid: edit must be one of"):
        esl.load(folder)
    (folder / "vectors.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"vectors\.safetensors is missing"):
        esl.load(folder)
    (folder / "config.json").write_text("{}")
    (folder / "vectors.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="no format_version"):
        esl.load(folder)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_explained(tmp_path):
    with pytest.raises(ArtifactError, match="neither a folder nor a hub id"):
        esl.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="could not be fetched from the hub"):
        esl.load("nobody/nothing")


def test_the_hub_gets_the_same_files(plan, tmp_path, monkeypatch):
    import huggingface_hub

    sent = {}

    class FakeApi:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            sent["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path):
            import shutil

            shutil.copytree(folder_path, tmp_path / "hub")
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    assert esl.push_to_hub(plan, "user/plan", private=True, token="t") == "https://hub/user/plan"
    assert sent == {"token": "t", "repo": ("user/plan", True)}
    assert torch.equal(esl.load(tmp_path / "hub").vectors[0].direction, plan.vectors[0].direction)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **k: str(tmp_path / "hub")
    )
    assert esl.load("user/plan").target == plan.target


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
