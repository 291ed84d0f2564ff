"""Exported files, read back as the other program reads them, do to a model what the plan does."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from functools import partial

import models
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError, ExpertSteerError
from expertsteer_lens.files.export import (
    FORMATS,
    ExportFormat,
    added_vectors,
    export_plan,
    register_format,
    to_gguf,
    to_hotwire,
    to_lm_eval,
    to_specs,
)
from expertsteer_lens.hosts.blocks import find_blocks
from expertsteer_lens.interventions.edits import EDITS, Edit, register_edit
from expertsteer_lens.interventions.gates import Gate

FAMILIES = {"gpt2": "h", "llama": "layers", "neox": "layers", "gemma2": "layers"}
IDS = torch.tensor([[1, 7, 12, 30, 5]])


BOTH = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


def plan_of(basis: str | None = None, layers=(1, 2), **keywords) -> esl.SteeringPlan:
    generator = torch.Generator().manual_seed(4)
    vectors = {
        f"blocks.{i}.hook_resid_post": torch.randn(models.D_MODEL, generator=generator)
        for i in layers
    }
    settings = {"coefficient": 0.7, "median_norms": dict.fromkeys(vectors, 5.0), **keywords}
    return esl.SteeringPlan.from_vectors(vectors, basis=basis, **settings)


@contextlib.contextmanager
def added_after(modules: dict[torch.nn.Module, torch.Tensor]):
    """What either program does: the block's output plus a vector, at every token."""

    def hook(vector):
        return lambda module, inputs, output: (
            (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
        )

    with contextlib.ExitStack() as stack:
        for module, vector in modules.items():
            stack.callback(module.register_forward_hook(hook(vector)).remove)
        yield


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
class TestWhatTheFilesDo:
    def steered(self, family, model):
        host = esl.as_host(model, tokenizer=models.tokenizer())
        plan = plan_of(host.basis)
        with plan.hooks(model):
            return plan, logits(model)

    def test_the_harness_file_steers_as_the_plan(self, family, tmp_path):
        model = models.hf(family)
        plan, expected = self.steered(family, model)
        content = torch.load(
            to_lm_eval(plan, tmp_path / "steer.pt", model=model), weights_only=True
        )
        assert list(content) == [f"{FAMILIES[family]}.1", f"{FAMILIES[family]}.2"]
        places = dict(model.base_model.named_modules())
        edits = {}
        for name, entry in content.items():
            assert (entry["action"], entry["bias"], entry["head_index"]) == ("add", None, None)
            edits[places[name]] = entry["steering_vector"] * float(entry["steering_coefficient"])
        with added_after(edits):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        assert float((logits(model) - expected).abs().max()) > 0.1, (
            "the plan does nothing here, so nothing was compared"
        )

    def test_the_control_vector_steers_as_the_plan(self, family, tmp_path):
        gguf = pytest.importorskip("gguf")
        model = models.hf(family)
        plan, expected = self.steered(family, model)
        reader = gguf.GGUFReader(str(to_gguf(plan, tmp_path / "steer.gguf", model_hint=family)))
        blocks = model.base_model.get_submodule(FAMILIES[family])
        edits = {}
        for tensor in reader.tensors:
            word, n = tensor.name.split(".")
            assert (word, tensor.tensor_type.name, tensor.data.ndim) == ("direction", "F32", 1)
            edits[blocks[int(n)]] = torch.tensor(tensor.data)
        assert len(edits) == 2
        with added_after(edits):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


class TestAddedVectors:
    def test_strengths_are_folded_in(self):
        plan = plan_of()
        found = added_vectors(plan)
        assert list(found) == [1, 2]
        for vector, (_, added) in zip(plan.vectors, found.items(), strict=True):
            torch.testing.assert_close(added, 0.7 * 5.0 * vector.direction)

    def test_vectors_at_one_layer_are_summed_and_zeros_left_out(self):
        one, two = plan_of(layers=(1,)), plan_of(layers=(1, 2), coefficient=0.0)
        both = esl.SteeringPlan(vectors=(*one.vectors, *one.vectors, *two.vectors))
        found = added_vectors(both)
        assert list(found) == [1]
        torch.testing.assert_close(found[1], 2 * one.vectors[0].delta)

    def test_a_centred_plan_adds_nothing_along_the_mean(self):
        added = added_vectors(plan_of("centred"))[1]
        assert abs(float(added.mean())) < 1e-6
        assert abs(float(added_vectors(plan_of("raw"))[1].mean())) > 1e-2

    def test_the_plan_and_its_file_share_no_memory(self, tmp_path):
        plan = plan_of()
        before = plan.vectors[0].direction.clone()
        torch.load(to_lm_eval(plan, tmp_path / "a.pt"), weights_only=True)["layers.1"][
            "steering_vector"
        ].zero_()
        added_vectors(plan)[1].zero_()
        assert torch.equal(plan.vectors[0].direction, before)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            (
                {"positions": "generated"},
                r"positions='generated' cannot be exported.*with_positions\('all'\)",
            ),
            ({"positions": [0, 1]}, r"positions=.* cannot be exported"),
            ({"edit": "clamp"}, "edit='clamp' at 'blocks.1.hook_resid_post' cannot be exported"),
            ({"edit": "ablate", "relative_to": "unit"}, "edit='ablate'"),
            (
                {
                    "edit": "add_contextual",
                    "parameters": dict.fromkeys(BOTH, models.edit_parameters("add_contextual")),
                },
                "the strength depends on the activation, which these formats do not read",
            ),
            ({"preserve_norm": True}, "preserve_norm=True at"),
            (
                {"gate": Gate(threshold=0.0, direction=torch.ones(models.D_MODEL))},
                "these formats have no conditions",
            ),
            ({"coefficient": 0.0}, "every coefficient of the plan is 0"),
        ],
    )
    def test_what_the_formats_cannot_say_is_refused(self, keywords, message, tmp_path):
        plan = plan_of(**keywords)
        for write, name in ((to_lm_eval, "a.pt"), (to_gguf, "a.gguf")):
            with pytest.raises(ArgumentError, match=message):
                write(plan, tmp_path / name)
            assert not (tmp_path / name).exists()

    def test_other_hook_points_are_refused(self, tmp_path):
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_mlp_out": torch.ones(4)}, relative_to="unit"
        )
        with pytest.raises(
            ArgumentError, match=r"hook 'blocks\.1\.hook_mlp_out' cannot be exported"
        ):
            to_lm_eval(plan, tmp_path / "a.pt")


class TestFormats:
    def test_both_formats_are_written_by_name(self, tmp_path):
        pytest.importorskip("gguf")
        plan = plan_of()
        by_name = export_plan(plan, tmp_path / "a.pt", format="lm_eval", blocks="h")
        assert list(torch.load(by_name, weights_only=True)) == ["h.1", "h.2"]
        one = to_gguf(plan, tmp_path / "a.gguf", model_hint="llama").read_bytes()
        options = {"format": "gguf", "model_hint": "llama"}
        assert export_plan(plan, tmp_path / "b.gguf", **options).read_bytes() == one

    def test_what_is_unknown_or_beyond_the_format_is_refused_before_it_is_written(self, tmp_path):
        with pytest.raises(ArgumentError, match=r"format must be one of .*closest: 'gguf'"):
            export_plan(plan_of(), tmp_path / "a", format="ggufs")
        with pytest.raises(ArgumentError, match="option of 'gguf' must be one of"):
            export_plan(plan_of(), tmp_path / "a", format="gguf", blocks="h")
        with pytest.raises(ArgumentError, match="cannot steer block 0"):
            export_plan(plan_of(layers=(0,)), tmp_path / "a", format="gguf")
        assert list(tmp_path.iterdir()) == []

    def test_a_format_of_ones_own_is_checked_before_it_writes(self, tmp_path):
        def write(plan, path, *, digits=3):
            text = "\n".join(f"{k} {v.norm():.{digits}f}" for k, v in added_vectors(plan).items())
            path.write_text(text)
            return path

        own = ExportFormat(write=write, check=added_vectors, options=("digits",))
        register_format("norms", own)
        register_format("norms", own)  # the same again is no conflict
        try:
            path = export_plan(plan_of(), tmp_path / "a.txt", format="norms", digits=1)
            assert path.read_text() == "1 3.5\n2 3.5"
            with pytest.raises(ArgumentError, match="positions='prompt' cannot be exported"):
                export_plan(plan_of(positions="prompt"), tmp_path / "b.txt", format="norms")
            with pytest.raises(ArgumentError, match="there is already a format 'norms'"):
                register_format("norms", FORMATS["gguf"])
            with pytest.raises(ArgumentError, match="must be an ExportFormat"):
                register_format("other", write)
        finally:
            del FORMATS["norms"]

    def test_a_constant_edit_of_ones_own_can_be_exported(self):
        def double(x, v, coefficient):
            return x + 2 * coefficient * v

        register_edit("double", Edit(double, is_constant=True))
        try:
            plan = plan_of(edit="double")
            torch.testing.assert_close(added_vectors(plan)[1], 2 * plan.vectors[0].delta)
        finally:
            del EDITS["double"]

    def test_the_harness_finds_the_blocks_of_a_model_that_keeps_them_in_a_decoder(self, tmp_path):
        import transformers

        config = transformers.OPTConfig(
            num_hidden_layers=2,
            hidden_size=32,
            ffn_dim=48,
            num_attention_heads=2,
            vocab_size=96,
            word_embed_proj_dim=32,
        )
        model = transformers.OPTForCausalLM(config).eval()
        path = to_lm_eval(plan_of(layers=(0, 1)), tmp_path / "a.pt", model=model)
        names = dict(model.base_model.named_modules())
        assert [n in names for n in torch.load(path, weights_only=True)] == [True, True]


class TestFiles:
    def test_the_harness_file_needs_its_ending(self, tmp_path):
        with pytest.raises(ArgumentError, match=r"path must end in \.pt or \.pth"):
            to_lm_eval(plan_of(), tmp_path / "steer.bin")

    def test_the_path_of_the_blocks_can_be_given(self, tmp_path):
        content = torch.load(
            to_lm_eval(plan_of(), tmp_path / "a.pth", blocks="decoder.layers"), weights_only=True
        )
        assert list(content) == ["decoder.layers.1", "decoder.layers.2"]

    def test_block_0_has_no_place_in_a_control_vector(self, tmp_path):
        with pytest.raises(ArgumentError, match="cannot steer block 0"):
            to_gguf(plan_of(layers=(0, 1)), tmp_path / "a.gguf")
        assert "layers.0" in torch.load(
            to_lm_eval(plan_of(layers=(0, 1)), tmp_path / "a.pt"), weights_only=True
        )

    def test_the_control_vector_says_what_it_is(self, tmp_path):
        gguf = pytest.importorskip("gguf")
        reader = gguf.GGUFReader(str(to_gguf(plan_of(), tmp_path / "a.gguf", model_hint="llama")))

        def text(key):
            return bytes(reader.get_field(key).parts[-1]).decode()

        assert text("general.architecture") == "controlvector"
        assert text("controlvector.model_hint") == "llama"
        assert "a scale of 1 is the plan" in text("general.description")
        assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 2

    def test_without_gguf_the_remedy_is_named(self, tmp_path, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ExpertSteerError, match=r"pip install 'expertsteer-lens\[export\]'"):
            to_gguf(plan_of(), tmp_path / "a.gguf")


class TestHotwire:
    def test_a_row_a_layer(self, tmp_path):
        plan = plan_of()
        path = to_hotwire(plan, tmp_path / "new" / "happy.pt", n_layers=4)
        matrix = torch.load(path, weights_only=True)  # as hotwire loads it
        assert matrix.shape == (4, models.D_MODEL)
        torch.testing.assert_close(matrix[2], plan.vectors[1].delta)
        assert not matrix[0].any()
        assert not matrix[3].any()

    def test_the_number_of_layers_is_the_targets(self, tmp_path):
        plan = dataclasses.replace(plan_of(), target={"n_layers": 5})
        assert torch.load(to_hotwire(plan, tmp_path / "a.pt")).shape[0] == 5
        model = models.hf("llama")
        assert torch.load(to_hotwire(plan, tmp_path / "a.pt", model=model)).shape[0] == 3
        for options in ({}, {"n_layers": 2}):
            with pytest.raises(ArgumentError, match="n_layers must say how many layers"):
                to_hotwire(plan_of(), tmp_path / "b.pt", **options)
        with pytest.raises(ArgumentError, match=r"must end in \.pt"):
            to_hotwire(plan, tmp_path / "b.gguf")

    def test_its_own_loader_finds_the_vector_of_each_layer(self, tmp_path):
        state = pytest.importorskip("hotwire._state", reason="hotwire-vllm is not installed")
        plan = plan_of()
        to_hotwire(plan, tmp_path / "happy.pt", n_layers=4)
        cpu, d = torch.device("cpu"), models.D_MODEL
        store = state.SteerState(4, d, 8, cpu, torch.float32, n_slots=4)
        store.load_store(str(tmp_path))
        for layer, vector in zip((1, 2), plan.vectors, strict=True):
            slot = store.slot_for("happy", layer, 1.0)
            assert torch.equal(store.bank.bank[slot], vector.delta)
            assert store.bank.scales[slot] == 1.0

    def test_a_layer_that_the_target_does_not_have_is_refused_in_every_format(self):
        plan = dataclasses.replace(plan_of(), target={"n_layers": 2})
        with pytest.raises(ArgumentError, match="steers layer 2, but its target has 2 layers"):
            added_vectors(plan)


class TestMerged:
    def test_the_checkpoint_says_what_the_plan_says_and_has_its_tokenizer(self, tmp_path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = models.hf("llama")
        host = esl.as_host(model, tokenizer=models.tokenizer())
        plan = plan_of(host.basis)
        with plan.hooks(model):
            expected = logits(model)
        folder = export_plan(plan, tmp_path / "merged", format="merged", model=model)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
        assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids
        with pytest.raises(ArgumentError, match="is not an empty folder"):
            export_plan(plan, folder, format="merged", model=model)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]

    def test_it_needs_the_model_and_a_plan_that_is_a_constant(self, tmp_path):
        with pytest.raises(ArgumentError, match="needs model="):
            export_plan(plan_of(), tmp_path / "m", format="merged")
        with pytest.raises(ArgumentError, match="positions='prompt' cannot be baked"):
            export_plan(plan_of(positions="prompt"), tmp_path / "m", format="merged")
        assert list(tmp_path.iterdir()) == []


class TestSpecs:
    @pytest.mark.skipif(models.has_hooked_transformer(), reason="TransformerLens 4 reads specs")
    def test_both_remote_drivers_of_transformer_lens_take_them(self):
        from transformer_lens.model_bridge.sources.inspect import hooks, intervention
        from transformer_lens.model_bridge.sources.vllm import intervention_specs

        plan = plan_of()
        specs = to_specs(plan)
        taken = intervention.build_interventions(specs, hooks.supported_hook_points(3))
        assert list(taken) == ["1:resid_post", "2:resid_post"]
        for name, spec in specs.items():
            intervention_specs.validate_spec(name, spec, width=models.D_MODEL)
        torch.testing.assert_close(
            torch.tensor(taken["2:resid_post"]["value"]), plan.vectors[1].delta
        )


class TestWriting:
    def test_what_was_there_survives_a_failure(self, tmp_path, monkeypatch):
        path = tmp_path / "a.pt"
        path.write_bytes(b"old")

        def full_disk(content, file):
            file.write(b"rubbish")
            raise OSError("no space left on device")

        monkeypatch.setattr(torch, "save", full_disk)
        with pytest.raises(ArtifactError, match="no space"):
            to_lm_eval(plan_of(), path)
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]

    def test_missing_folders_are_made(self, tmp_path):
        pytest.importorskip("gguf")
        assert to_lm_eval(plan_of(), tmp_path / "x" / "y" / "a.pt").is_file()
        assert to_gguf(plan_of(), tmp_path / "z" / "a.gguf").is_file()

    def test_what_enters_a_block_leaves_the_one_before(self):
        vectors = {"blocks.3.hook_resid_pre": torch.tensor([3.0, 4.0])}
        plan = esl.SteeringPlan.from_vectors(vectors, relative_to="unit", coefficient=5.0)
        assert list(added_vectors(plan)) == [2]


class TestNamesOfTheHarness:
    """Names below `model.base_model`, which is where the harness looks."""

    def names(self, model, tmp_path):
        width = model.config.get_text_config().hidden_size
        vectors = {"blocks.0.hook_resid_post": torch.ones(width)}
        plan = esl.SteeringPlan.from_vectors(vectors, coefficient=1.0, relative_to="unit")
        (name,) = torch.load(to_lm_eval(plan, tmp_path / "o.pt", model=model), weights_only=True)
        block = model.base_model.get_submodule(name)  # the harness: named_modules of base_model
        assert block is model.get_submodule(find_blocks(model).layers[0])
        return name

    def test_opt(self, tmp_path):
        import transformers as tf

        config = tf.OPTConfig(
            num_hidden_layers=2,
            hidden_size=16,
            ffn_dim=16,
            num_attention_heads=2,
            vocab_size=50,
            word_embed_proj_dim=16,
        )
        assert self.names(tf.OPTForCausalLM(config).eval(), tmp_path) == "decoder.layers.0"

    def test_multimodal_gemma(self, tmp_path):
        import transformers as tf

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1}
        text = {**sizes, "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": 50}
        vision = {**sizes, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
        config = tf.Gemma3Config(
            text_config={**text, "head_dim": 16}, vision_config=vision, mm_tokens_per_image=4
        )
        model = tf.Gemma3ForConditionalGeneration(config).eval()
        assert self.names(model, tmp_path) == "language_model.layers.0"


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(to_lm_eval, ".pt"), (partial(to_hotwire, n_layers=4), ".pt"), (to_gguf, ".gguf")],
)
def test_a_file_that_cannot_be_written_is_a_named_error(write, suffix, tmp_path, monkeypatch):
    file = write(plan_of(), tmp_path / f"a{suffix}")
    before = file.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    for call in ("fsync", "replace"):

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(ArtifactError, match=r"could not be written.*No space left"):
                write(plan_of(coefficient=0.1), file)
        assert file.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == [file.name]
    (tmp_path / f".a.expertsteer-new{suffix}").write_text("of a process that was killed")
    write(plan_of(), file)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_merged_checkpoint_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        folder = export_plan(plan_of(), tmp_path / "m", format="merged", model=models.hf("llama"))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
