"""Other people's vectors: read as they were meant, steered and evaluated like ours."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass

import models
import numpy as np
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError
from expertsteer_lens.steer.foreign import READERS, Reader, register_reader

D = models.D_MODEL
GENERATOR = torch.Generator().manual_seed(3)
ONE, TWO = torch.randn(2, D, generator=GENERATOR)
POST = "blocks.{}.hook_resid_post".format
read = esl.SteeringPlan.from_foreign


@dataclass
class SteeringVector:
    """As steering-vectors 0.12 has it."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"


@dataclass
class ControlVector:
    """As repeng 0.4 has it."""

    model_type: str
    directions: dict[int, np.ndarray]


def same(plan, wanted: dict[str, torch.Tensor]) -> None:
    assert [v.hook_name for v in plan.vectors] == list(wanted)
    for vector, value in zip(plan.vectors, wanted.values(), strict=True):
        torch.testing.assert_close(vector.delta, value.float(), atol=1e-6, rtol=1e-5)
    assert plan.positions == "all"


def plan_of() -> esl.SteeringPlan:
    vectors = {POST(1): ONE, POST(2): TWO}
    norms = {name: 5.0 for name in vectors}
    plan = esl.SteeringPlan.from_vectors(vectors, coefficient=0.7, median_norms=norms)
    return dataclasses.replace(plan, target={"n_layers": 3})


SOURCES = {
    "steering_vectors": SteeringVector({1: ONE, 2: TWO}),
    "a saved steering vector": dataclasses.asdict(SteeringVector({1: ONE, 2: TWO})),
    "repeng": ControlVector("llama", {2: TWO.numpy(), 1: ONE.numpy()}),
    "by layer": {1: ONE, 2: TWO},
    "by hook name": {POST(1): ONE, POST(2): TWO},
    "by module": {"model.layers.1": ONE, "model.layers.2": TWO},
    "as one row each": {1: ONE[None], 2: TWO[None]},
    "in half precision": {1: ONE.bfloat16().float(), 2: TWO.half().float()},
    "matrix": torch.stack([torch.zeros(D), ONE, TWO]),
    "array": np.stack([np.zeros(D), ONE.numpy(), TWO.numpy()]),
}


@pytest.mark.parametrize("source", SOURCES)
def test_vectors_are_added_as_they_are(source):
    tolerance = 0.02 if "half" in source else 1e-6
    plan = read(SOURCES[source])
    assert [v.hook_name for v in plan.vectors] == [POST(1), POST(2)]
    for vector, wanted in zip(plan.vectors, (ONE, TWO), strict=True):
        torch.testing.assert_close(vector.delta, wanted, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("format", ["lm_eval", "gguf", "hotwire"])
def test_what_we_export_is_read_back(format, tmp_path):
    if format == "gguf":
        pytest.importorskip("gguf")
    plan, suffix = plan_of(), "gguf" if format == "gguf" else "pt"
    path = esl.export.export_plan(plan, tmp_path / f"x.{suffix}", format=format)
    back = read(path)
    same(back, {v.hook_name: v.delta for v in plan.vectors})
    known_as = {"hotwire": "matrix"}.get(format, format)
    assert back.provenance == {"read_from": known_as, "file": f"x.{suffix}"}


def test_files_of_bare_tensors(tmp_path):
    from safetensors.torch import save_file

    torch.save({1: ONE, 2: TWO}, tmp_path / "a.pt")
    save_file({"layers.1": ONE, "layers.2": TWO}, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        same(read(str(tmp_path / name)), {POST(1): ONE, POST(2): TWO})


def test_a_control_vector_in_half_precision(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "v.gguf"), "controlvector")
    writer.add_tensor("direction.2", TWO.numpy().astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same(read(tmp_path / "v.gguf"), {POST(2): TWO.half()})


def test_strength_layers_and_other_hook_points():
    source = {0: ONE, 1: TWO}
    same(read(source, coefficient=-2.0), {POST(0): -2 * ONE, POST(1): -2 * TWO})
    same(read(source, layers=[1]), {POST(1): TWO})
    assert read(source, positions="generated").positions == "generated"
    same(read(SteeringVector({1: ONE}, "mlp")), {"blocks.1.hook_mlp_out": ONE})
    same(read(SteeringVector({1: ONE}, "self_attn")), {"blocks.1.hook_attn_out": ONE})
    entry = {"steering_vector": ONE, "steering_coefficient": 3.0, "action": "add"}
    harness = {"layers.2.mlp": entry, "layers.0.self_attn": entry}
    same(read(harness), {"blocks.2.hook_mlp_out": 3 * ONE, "blocks.0.hook_attn_out": 3 * ONE})


def test_rows_of_hidden_states_are_one_further():
    states = torch.stack([ONE, TWO, ONE + TWO, ONE])  # embeddings, two blocks, after the final norm
    same(read(states, rows="hidden_states"), {POST(0): TWO, POST(1): ONE + TWO})
    same(read(states, layers=[1]), {POST(1): TWO})
    with pytest.raises(ArgumentError, match=r"rows='hidden_states' goes with a matrix"):
        read({1: ONE}, rows="hidden_states")


def test_in_units_of_the_median_norm_the_strength_is_the_same():
    plan = read({1: ONE, 2: TWO}, median_norms={POST(1): 4.0, POST(2): 8.0}, coefficient=2.0)
    same(plan, {POST(1): 2 * ONE, POST(2): 2 * TWO})
    assert plan.vectors[1].coefficient == pytest.approx(2 * float(TWO.norm()) / 8)


def test_they_steer_as_a_bare_addition_does():
    model = models.hf("llama")
    ids = torch.tensor([[1, 7, 12, 30, 5]])

    def add(module, inputs, output):
        return (output[0] + ONE, *output[1:]) if isinstance(output, tuple) else output + ONE

    with torch.no_grad():
        handle = model.model.layers[1].register_forward_hook(add)
        wanted = model(ids).logits
        handle.remove()
        with read(ControlVector("llama", {1: ONE.numpy()})).hooks(model):
            torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_they_are_evaluated_against_random_directions():
    target = esl.zoo.load("target", host="huggingface")
    direction = torch.randn(target.config.hidden_size, generator=torch.Generator().manual_seed(0))
    texts = esl.zoo.neutral_texts(6)
    norms = esl.capture(target, texts, hook_names=[POST(2)])
    result = esl.evaluate(
        read({2: direction}, median_norms=norms),
        target,
        behaviour=esl.zoo.behaviour(4),
        neutral=texts[:3],
        calibration_texts=texts[3:],
        n_random=2,
    )
    assert "random" in result.verdict
    assert len(result.to_pandas()) > 2


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (object(), ArgumentError, "source must be a file or an object of one of"),
        ({}, ArgumentError, "source must be a file or an object of one of"),
        ({-1: ONE}, ArgumentError, "layer -1 counts from the end"),
        ({"lm_head": ONE}, ArgumentError, "'lm_head' names no block"),
        ({1: torch.zeros(D)}, ArgumentError, "every vector is zero"),
        ({1: torch.full((D,), torch.nan)}, DataError, "must be finite and have one axis"),
        ({1: torch.ones(3, D)}, DataError, r"got shape \(3, 32\)"),
        (ONE, DataError, r"\[n_layers, d\]; got shape \(32,\)"),
        (SteeringVector({1: ONE}, "input_layernorm"), ArgumentError, "layer_type of a steering"),
        (
            {"layers.1": {"steering_vector": ONE, "action": "clamp"}},
            ArgumentError,
            "action='clamp' at 'layers.1' cannot be read",
        ),
        (
            {"layers.1": {"steering_vector": ONE, "action": "add", "head_index": 2}},
            ArgumentError,
            "head_index=2",
        ),
        ("nowhere.pt", ArgumentError, "there is no file 'nowhere.pt'"),
    ],
)
def test_what_a_plan_cannot_say_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        read(source)


def test_files_that_cannot_be_trusted_are_refused(tmp_path):
    torch.save({"layer_activations": types.SimpleNamespace()}, tmp_path / "a.pt")
    (tmp_path / "b.gguf").write_bytes(b"GGML????")
    (tmp_path / "c.safetensors").write_bytes(b"no")
    (tmp_path / "d.bin").write_bytes(b"no")
    (tmp_path / "e.pt").write_bytes(b"")
    for name, message in (
        ("a.pt", "could run code and are not loaded"),
        ("b.gguf", "is no GGUF file"),
        ("c.safetensors", "is no safetensors file"),
        ("e.pt", "is no file of torch.save"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read(tmp_path / name)
    with pytest.raises(ArgumentError, match="must end in one of"):
        read(tmp_path / "d.bin")


def test_a_model_in_gguf_is_no_control_vector(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("blk.0.ffn_down.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match="is no control vector"):
        read(tmp_path / "m.gguf")


def test_layers_that_are_not_there_and_names_that_are_taken():
    with pytest.raises(ArgumentError, match=r"asks for \[7\]; there are \[1, 2\]"):
        read({1: ONE, 2: TWO}, layers=[2, 7])
    with pytest.raises(ArgumentError, match="format must be one of"):
        read({1: ONE}, format="ggufs")
    with pytest.raises(ArgumentError, match="there is already a reader 'gguf'"):
        register_reader("gguf", Reader(matches=bool, read=dict))
    register_reader("gguf", READERS["gguf"])  # the same again is no conflict
