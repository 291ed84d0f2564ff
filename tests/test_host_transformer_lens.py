"""TransformerLens as a host: every trap of reading, hooking and weight processing, on Bridge and
HookedTransformer.

Runs with TransformerLens 4 and 3.9; what needs HookedTransformer is skipped where it no longer
exists."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from expertsteer_lens.errors import (
    ArgumentError,
    DataError,
    HookNameError,
    HostError,
    InterventionError,
    ModelStateError,
)
from expertsteer_lens.hosts import as_host, capture, fingerprints_match
from expertsteer_lens.hosts.table import nothing_installed
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.steer.plan import SteeringPlan

PROMPTS = [
    "the cat saw a dog",
    "sun",
    "once upon a time there was a big red house",
    "the dog ran home",
]
HOOK = "blocks.1.hook_resid_post"
KINDS = ("bridge", "bridge compat", "hooked", "hooked raw")
kinds = pytest.mark.parametrize("kind", KINDS)
families = pytest.mark.parametrize("family", models.FAMILIES)


def fresh(kind: str, family: str = "gpt2") -> Any:
    return models.on_host(kind, family)


shared_model = functools.cache(fresh)


def ids_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


IDS = ids_of([1, 4, 7, 19, 6, 8])


def run(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, return_type="logits")


def direction(seed: int = 0) -> Tensor:
    return torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(seed))


def plan_at(*names: str, coefficient: float = 5.0, **options: Any) -> SteeringPlan:
    vectors = {name: direction(i) for i, name in enumerate(names or (HOOK,))}
    return SteeringPlan.from_vectors(
        vectors, coefficient=coefficient, relative_to="unit", **options
    )


def hook_count(model: Any) -> int:
    """Every forward hook and pre-hook anywhere in the model, hook points included.

    A Bridge puts permanent hooks of its own on when it is first run: run it before counting.
    """
    modules = set(model.modules()) | set(model.hook_dict.values())
    inner = getattr(model, "original_model", None)
    if isinstance(inner, nn.Module):
        modules |= set(inner.modules())
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(getattr(m, "fwd_hooks", []))
        for m in modules
    )


# -- recognising a model --------------------------------------------------------------------------


@kinds
def test_a_model_is_recognised_by_what_it_can_do(kind: str) -> None:
    host = as_host(shared_model(kind))
    assert (host.kind, host.n_layers, host.d_model, host.d_vocab) == ("transformer_lens", 3, 32, 96)
    assert host.hook_names() == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    assert as_host(host) is host


def test_something_else_is_refused_with_what_was_looked_for() -> None:
    with pytest.raises(HostError, match=r"no hook_dict and cfg.*Pass a TransformerBridge"):
        as_host(nn.Linear(2, 2))


def test_measurements_do_not_keep_a_model_alive() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1))
    from expertsteer_lens.hosts.facts import facts

    facts(model)["basis"] = "raw"
    assert facts(model) == {"basis": "raw"}
    with torch.no_grad():
        model.weight += 1
    assert facts(model) == {}  # other weights, other facts
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# -- hook names -----------------------------------------------------------------------------------


@kinds
def test_a_typo_in_a_list_of_names_is_an_error_with_the_closest(kind: str) -> None:
    model = shared_model(kind)
    with pytest.raises(
        HookNameError,
        match=r"'blocks.1.hook_resid_pots' is not on this model .*closest: 'blocks.1.hook_resid_",
    ):
        capture(model, PROMPTS, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pots"])
    with (
        pytest.raises(HookNameError, match="hook_resid_pots"),
        plan_at("blocks.1.hook_resid_pots").hooks(model),
    ):
        pass


@kinds
def test_a_layer_out_of_range_is_named(kind: str) -> None:
    with pytest.raises(HookNameError, match="layer 7 is out of range, it has layers 0 to 2"):
        as_host(shared_model(kind)).check_hook_names(["blocks.7.hook_resid_post"])


def test_one_name_instead_of_a_list_and_an_unknown_kind_are_errors() -> None:
    host = as_host(shared_model("bridge"))
    with pytest.raises(HookNameError, match="must be a list, got one str"):
        host.check_hook_names(HOOK)
    with pytest.raises(HookNameError, match=r"'blocks.0.hook_resid_past' is not on this model"):
        host.hook_names("hook_resid_past")
    with pytest.raises(ArgumentError, match="hook_names is empty"):
        capture(shared_model("bridge"), PROMPTS, [])


@pytest.mark.parametrize("kind", ["bridge", "bridge compat"])
def test_alias_and_canonical_name_are_one_place_and_cannot_both_be_steered(kind: str) -> None:
    model = shared_model(kind)
    with (
        pytest.raises(HookNameError, match="one and the same hook point"),
        plan_at(HOOK, "blocks.1.hook_out").hooks(model),
    ):
        pass
    store = capture(model, PROMPTS, [HOOK, "blocks.1.hook_out"])  # reading under both is harmless
    assert store.hook_names == [HOOK, "blocks.1.hook_out"]
    assert torch.equal(store[HOOK], store["blocks.1.hook_out"])


@pytest.mark.parametrize("kind", ["bridge", "bridge compat"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_resid_mid_can_be_read_but_not_steered_on_a_bridge(kind: str, family: str) -> None:
    model = shared_model(kind, family)
    names = [
        f"blocks.1.{n}"
        for n in (
            "hook_resid_pre",
            "hook_attn_out",
            "hook_resid_mid",
            "hook_mlp_out",
            "hook_resid_post",
        )
    ]
    pre, attn, mid, mlp, post = (capture(model, PROMPTS, names)[n] for n in names)
    torch.testing.assert_close(pre + attn, mid, atol=1e-4, rtol=0)
    torch.testing.assert_close(mid + mlp, post, atol=1e-4, rtol=0)
    with (
        pytest.raises(HookNameError, match="input of the MLP branch alone"),
        plan_at(names[2]).hooks(model),
    ):
        pass


@pytest.mark.parametrize("kind", ["hooked", "hooked raw"])
def test_resid_mid_on_a_hooked_transformer_reaches_the_skip_path(kind: str) -> None:
    model = shared_model(kind)
    with plan_at("blocks.1.hook_resid_mid").hooks(model):
        with_mid = capture(
            model, PROMPTS, [HOOK, "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid"]
        )
    steered_sum = with_mid["blocks.1.hook_resid_mid"] + with_mid["blocks.1.hook_mlp_out"]
    torch.testing.assert_close(steered_sum, with_mid[HOOK], atol=1e-4, rtol=0)


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_attn_out", "hook_mlp_out"])
@kinds
def test_other_sites_of_the_residual_width_can_be_steered(kind: str, site: str) -> None:
    model = shared_model(kind, "llama")
    name = f"blocks.1.{site}"
    plain = capture(model, PROMPTS, [name, HOOK])
    with plan_at(name).hooks(model):
        steered = capture(model, PROMPTS, [name, HOOK])
    unit = direction() / direction().norm()
    torch.testing.assert_close(
        steered[name] - plain[name], 5 * unit.expand(4, -1), atol=1e-4, rtol=0
    )
    assert (steered[HOOK] - plain[HOOK]).norm(dim=1).min() > 1


# -- reading --------------------------------------------------------------------------------------


@families
@kinds
def test_batched_reading_equals_reading_one_prompt_at_a_time(kind: str, family: str) -> None:
    model = shared_model(kind, family)
    together = capture(model, PROMPTS, batch_size=3)
    for i, prompt in enumerate(PROMPTS):
        alone = capture(model, [prompt])
        for name in together:
            torch.testing.assert_close(together[name][i], alone[name][0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("positions", ["last", "mean", 0, -2, "all"])
def test_positions_of_a_capture_count_real_tokens(positions: Any) -> None:
    model = shared_model("bridge", "llama")
    texts = [PROMPTS[0], PROMPTS[2]]
    store = capture(model, texts, [HOOK], positions=positions, labels=[1, 0])
    want = []
    for text in texts:
        seen: list[Tensor] = []
        host = as_host(model)
        with host.intervene({HOOK: lambda x, seen=seen: seen.append(x[0].clone())}):
            host.forward(host.tokenize([text]))
        rows = seen[0]
        want.append(
            {"last": rows[-1:], "mean": rows.mean(0, keepdim=True), "all": rows}.get(positions)
        )
        if want[-1] is None:
            want[-1] = rows[positions][None]
    torch.testing.assert_close(store[HOOK], torch.cat(want), atol=2e-5, rtol=0)
    assert store.labels is not None
    assert store.labels.tolist() == [1] * len(want[0]) + [0] * len(want[1])


def test_a_position_outside_a_prompt_names_the_prompt() -> None:
    with pytest.raises(DataError, match=r"positions=4 is outside prompts\[1\], which has 2 tokens"):
        capture(shared_model("bridge"), PROMPTS[:3], positions=4)


@kinds
def test_a_store_does_not_move_when_the_model_is_run_or_edited_in_place_later(kind: str) -> None:
    model = shared_model(kind)
    store = capture(model, PROMPTS)
    kept = store[HOOK].clone()
    host = as_host(model)
    with host.intervene({HOOK: lambda x: x.add_(100.0)}), torch.no_grad():
        host.forward(host.tokenize(PROMPTS))
        assert not torch.equal(
            capture(model, PROMPTS)[HOOK], kept
        )  # readers come after it and see the edit
    assert torch.equal(store[HOOK], kept)
    assert torch.equal(capture(model, PROMPTS)[HOOK], kept)


@kinds
def test_an_in_place_hook_that_runs_after_the_reader_cannot_reach_what_was_read(kind: str) -> None:
    model = fresh(kind, "llama")
    host = as_host(model)
    batch = host.tokenize(PROMPTS[:1])
    want = host.read(batch, [HOOK], "all")[HOOK]
    intervene = host.intervene

    @contextlib.contextmanager
    def with_vandal(fns: Any) -> Iterator[Any]:
        with intervene(fns) as registration:
            model.add_hook(HOOK, lambda tensor, hook: tensor.mul_(0.0))
            yield registration

    host.intervene = with_vandal  # type: ignore[method-assign]
    assert torch.equal(host.read(batch, [HOOK], "all")[HOOK], want)


@kinds
def test_stopping_early_runs_no_later_block_and_k_beyond_the_end_gives_logits(kind: str) -> None:
    host = as_host(shared_model(kind, "llama"))
    batch, reached = host.tokenize(PROMPTS), []
    with host.intervene({"blocks.2.hook_resid_post": lambda x: reached.append(2)}), torch.no_grad():
        entering = host.forward(batch, stop_at_layer=2)
        assert reached == []
        assert entering.shape[-1] == host.d_model
        for k in (3, 10, None):
            assert host.forward(batch, stop_at_layer=k).shape[-1] == host.d_vocab
    assert len(reached) == 3


@kinds
def test_capture_stops_after_the_last_layer_it_needs(kind: str) -> None:
    model, reached = shared_model(kind, "llama"), []
    with as_host(model).intervene({"blocks.2.hook_resid_pre": lambda x: reached.append(1)}):
        capture(model, PROMPTS, ["blocks.0.hook_resid_post"])
        assert as_host(model).basis  # measured with hooks of others out of action
        assert as_host(model).fingerprint
    assert reached == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_read_in_float32_and_steered_in_their_own(
    dtype: torch.dtype,
) -> None:
    model = models.bridge("gpt2", dtype=dtype)
    store = capture(model, PROMPTS)
    assert store[HOOK].dtype == torch.float32
    torch.testing.assert_close(
        store[HOOK], capture(shared_model("bridge"), PROMPTS)[HOOK], atol=0.3, rtol=0.1
    )
    for edit, unit in (("add", 5.0), ("ablate", 1.0), ("clamp", 3.0)):
        with plan_at(coefficient=unit, edit=edit).hooks(model):
            assert run(model).dtype == dtype
    assert fingerprints_match(
        as_host(model).fingerprint, as_host(shared_model("bridge")).fingerprint
    )


def test_nan_names_the_hook_and_the_prompt() -> None:
    model = shared_model("bridge")
    ids = as_host(model).tokenize([PROMPTS[1]]).input_ids

    def poison(x: Tensor) -> Tensor | None:
        return torch.full_like(x, torch.nan) if x.shape[1] == ids.shape[1] else None

    with as_host(model).intervene({"blocks.0.hook_resid_post": poison}):
        with pytest.raises(
            DataError, match=r"prompts\[1\] at 'blocks.0.hook_resid_post' holds NaN or Inf"
        ):
            capture(model, PROMPTS, batch_size=1)


def test_the_store_says_where_it_came_from() -> None:
    facts = capture(shared_model("bridge"), PROMPTS, [HOOK], prepend_bos=False).provenance
    wanted = {
        "host": "transformer_lens",
        "name": "tiny-gpt2",
        "basis": "centred",
        "positions": "last",
        "prepend_bos": False,
    }
    assert {k: facts[k] for k in wanted} == wanted
    other = capture(shared_model("bridge"), PROMPTS[::-1], [HOOK]).provenance
    assert facts["texts_digest"] != other["texts_digest"]
    assert facts["fingerprint"] == other["fingerprint"]
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompts": []}, DataError, "prompts is empty"),
        ({"prompts": "one"}, DataError, "must be a list of texts"),
        ({"batch_size": 0}, ArgumentError, "batch_size must be an integer"),
        (
            {"labels": [1, 0]},
            DataError,
            r"labels must have one label per row: expected shape \(4,\)",
        ),
        ({"positions": "first"}, ArgumentError, "positions must be"),
        ({"hook_names": ["blocks.1.attn.hook_pattern"]}, HookNameError, r"only \[batch, pos, d\]"),
    ],
)
def test_capture_refuses_bad_arguments(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {"prompts": PROMPTS, **change}
    with pytest.raises(error, match=words):
        capture(shared_model("bridge"), **arguments)


def test_progress_shows_a_bar_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = shared_model("bridge")
    quiet = capture(model, PROMPTS, [HOOK])
    assert "capture" not in capsys.readouterr().err
    shown = capture(model, PROMPTS, [HOOK], progress=True)
    assert "capture" in capsys.readouterr().err
    assert torch.equal(quiet[HOOK], shown[HOOK])


# -- tokens ---------------------------------------------------------------------------------------


@families
def test_our_ids_are_the_plain_tokenizer_with_one_bos_on_every_family(family: str) -> None:
    host = as_host(shared_model("bridge", family))
    assert host.tokenize(["the cat"]).input_ids.tolist() == [[1, 4, 7]]
    assert host.tokenize(["the cat"], prepend_bos=False).input_ids.tolist() == [[4, 7]]
    assert host.tokenize(["<s> the cat"]).input_ids.tolist() == [[1, 4, 7]]  # never two
    batch = host.tokenize(["the cat saw", "sun"])
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (len(batch), batch.lengths.tolist()) == (2, [4, 2])


def test_a_tokenizer_without_pad_or_bos_is_no_obstacle() -> None:
    model = models.bridge("llama", pad=False, bos=False)
    model.tokenizer.pad_token_id = (
        None  # TransformerLens gives it one; some tokenizers lose it again
    )
    together = capture(model, PROMPTS, [HOOK], prepend_bos=False)
    alone = capture(model, PROMPTS[1:2], [HOOK], prepend_bos=False)
    torch.testing.assert_close(together[HOOK][1], alone[HOOK][0], atol=2e-5, rtol=0)

    class NoBos:
        bos_token_id = eos_token_id = pad_token_id = None

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [4] * len(text.split())}

    host = as_host(model)
    host.tokenizer = NoBos()
    assert host.tokenize(["a b", "c"]).input_ids.tolist() == [[4, 4], [4, 0]]
    with pytest.raises(ArgumentError, match="the tokenizer has no BOS token"):
        host.tokenize(["a"], prepend_bos=True)
    host.tokenizer = None
    with pytest.raises(HostError, match="has no tokenizer"):
        host.tokenize(["a"])


def test_too_long_prompts_are_refused_not_cut() -> None:
    host = as_host(shared_model("bridge"))
    with pytest.raises(
        DataError,
        match=r"prompts\[1\] has 71 tokens, more than the model's context length 64; shorten",
    ):
        host.tokenize(["the", "the " * 70])
    with pytest.raises(DataError, match=r"prompts\[0\] has 6 tokens, more than max_length 3"):
        capture(shared_model("bridge"), PROMPTS, max_length=3)


# -- hooks: order, removal, exceptions ------------------------------------------------------------


@kinds
def test_hooks_run_in_the_order_they_were_put_on(kind: str) -> None:
    model = fresh(kind)
    before, after = [], []
    model.add_hook(HOOK, lambda tensor, hook: before.append(tensor.clone()))
    with plan_at(basis="raw").hooks(model):
        _, cache = model.run_with_cache(IDS, names_filter=HOOK)
        model.run_with_hooks(
            IDS, fwd_hooks=[(HOOK, lambda tensor, hook: after.append(tensor.clone()))]
        )
    unit = direction() / direction().norm()
    torch.testing.assert_close(
        after[0] - before[0], 5 * unit.expand_as(after[0]), atol=1e-4, rtol=0
    )
    assert torch.equal(after[0], cache[HOOK])  # a probe inside the block sees the steered stream
    model.reset_hooks()


@kinds
def test_nothing_but_our_hooks_is_removed(kind: str) -> None:
    model, calls = fresh(kind), []
    model.add_hook(HOOK, lambda tensor, hook: calls.append("temporary"))
    model.add_perma_hook(HOOK, lambda tensor, hook: calls.append("permanent"))
    run(model)
    count = hook_count(model)
    for _ in range(2):
        with plan_at(HOOK, "blocks.0.hook_resid_post").hooks(model):
            assert hook_count(model) > count
            run(model)
    assert hook_count(model) == count
    calls.clear()
    run(model)
    assert calls == ["temporary", "permanent"]


@kinds
def test_an_exception_inside_leaves_no_hook_and_bit_equal_outputs(kind: str) -> None:
    model = fresh(kind)
    plain = run(model)
    run(model)
    count = hook_count(model)

    def fails() -> None:
        with plan_at(HOOK, "blocks.2.hook_resid_post").hooks(model):
            assert not torch.equal(run(model), plain)
            assert "generate" in model.__dict__
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    assert hook_count(model) == count
    assert not {"generate", "hf_generate", "generate_stream"} & set(
        model.__dict__
    )  # nor the note-taker of generate
    assert torch.equal(run(model), plain)


@kinds
def test_a_registration_that_fails_half_way_is_undone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(kind)
    plain, count = run(model), hook_count(model)
    point = model.hook_dict["blocks.2.hook_resid_post"]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setitem(point.__dict__, "add_hook", refuse)
        with (
            pytest.raises(RuntimeError, match="no room"),
            plan_at(HOOK, "blocks.2.hook_resid_post").hooks(model),
        ):
            pass
    assert hook_count(model) == count
    assert torch.equal(run(model), plain)


@kinds
def test_nested_plans_add_up_and_come_off_one_by_one(kind: str) -> None:
    model = fresh(kind)
    plain = run(model)
    one, both = (
        plan_at(),
        SteeringPlan(vectors=plan_at().vectors + plan_at("blocks.2.hook_resid_post").vectors),
    )
    with one.hooks(model):
        alone = run(model)
        with plan_at("blocks.2.hook_resid_post").hooks(model):
            nested = run(model)
        assert torch.equal(run(model), alone)
    assert torch.equal(run(model), plain)
    with both.hooks(model):
        assert torch.equal(run(model), nested)


@kinds
def test_handles_come_off_in_any_order_and_twice(kind: str) -> None:
    model = fresh(kind)
    plain, count = run(model), hook_count(model)
    first, second = plan_at().attach(model), plan_at("blocks.0.hook_resid_post").attach(model)
    first.remove()
    with plan_at("blocks.0.hook_resid_post").hooks(model):
        doubled = run(model)
    assert not torch.equal(run(model), doubled)
    second.remove()
    second.remove()
    first.remove()
    assert hook_count(model) == count
    assert torch.equal(run(model), plain)
    model.generate(IDS, max_new_tokens=2, verbose=False)
    assert "generate" not in model.__dict__


@kinds
def test_reset_hooks_by_the_user_is_noticed_at_the_end(kind: str) -> None:
    model = fresh(kind)

    def resets() -> None:
        with plan_at().hooks(model):
            run(model)
            model.reset_hooks()
            run(model)

    with pytest.raises(
        InterventionError,
        match=r"\['blocks.1.hook_resid_post'\] was removed while it was on \(reset_hooks",
    ):
        resets()

    def resets_and_fails() -> None:
        with plan_at().hooks(model):
            model.reset_hooks()
            raise KeyError("the user's own error comes first")

    with pytest.raises(KeyError, match="the user's own"):
        resets_and_fails()


class Wrapped(nn.Module):
    """What SAELens puts in the place of a HookPoint: a module with hook points of its own
    inside."""

    def __init__(self, point: nn.Module) -> None:
        super().__init__()
        self.hook_sae_output = type(point)()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_sae_output(0.9 * x)


def put_sae_on(model: Any, name: str) -> None:
    block, attribute = model.blocks[1], name.rsplit(".", 1)[1]
    setattr(block, attribute, Wrapped(model.hook_dict[name]))
    model.setup()


@pytest.mark.parametrize("kind", ["hooked", "hooked raw"])
def test_an_sae_on_the_hook_point_is_refused_on_entry_and_noticed_later(kind: str) -> None:
    model = fresh(kind)

    def puts_sae_on() -> None:
        with plan_at().hooks(model):
            put_sae_on(model, HOOK)
            run(model)

    with pytest.raises(InterventionError, match="an SAE put on the hook point"):
        puts_sae_on()
    with (
        pytest.raises(
            HookNameError, match=rf"An SAE sits on it: steer at '{HOOK}.hook_sae_output'"
        ),
        plan_at().hooks(model),
    ):
        pass
    plain = run(model)
    with plan_at(f"{HOOK}.hook_sae_output").hooks(model):
        assert (run(model) - plain).abs().max() > 0.1


def test_a_real_sae_stacks_with_steering() -> None:
    sae_lens = pytest.importorskip(
        "sae_lens", reason="SAELens needs TransformerLens 3; this runs in that environment"
    )
    hooked = models.hooked("gpt2")
    model = sae_lens.HookedSAETransformer(hooked.cfg, tokenizer=hooked.tokenizer)
    model.load_state_dict(hooked.state_dict())
    sae = sae_lens.SAE.from_dict(
        sae_lens.StandardSAEConfig(d_in=32, d_sae=64, dtype="float32", device="cpu").to_dict()
        | {"metadata": {"hook_name": HOOK}}
    )
    for parameter in sae.parameters():
        parameter.data = 0.2 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    plain = run(model)
    with plan_at().hooks(model):  # steer, then read the steered stream through the SAE
        steered = run(model)
        with torch.no_grad():
            seen = model.run_with_cache(IDS, names_filter=HOOK)[1][HOOK]
        assert sae(seen).shape == seen.shape
    assert (steered - plain).abs().max() > 0.1
    with model.saes(saes=[sae]):
        with pytest.raises(HookNameError, match="hook_sae_output"), plan_at().hooks(model):
            pass
        replaced = run(model)
        with plan_at(f"{HOOK}.hook_sae_output").hooks(model):
            assert (run(model) - replaced).abs().max() > 0.1
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("per", ["row", "token"])
@pytest.mark.parametrize("kind", ["hooked", "hooked raw"])
def test_a_gate_that_a_pass_does_not_reach_is_an_error_not_an_old_answer(
    kind: str, per: str
) -> None:
    model = fresh(kind)
    gate = Gate(
        direction=direction(7), threshold=-1e6, hook_name="blocks.0.hook_resid_post", per=per
    )
    plan = plan_at(gate=gate)
    with torch.no_grad():
        residual = model(IDS, stop_at_layer=1)

    def skips_the_gate() -> None:
        with plan.hooks(model), torch.no_grad():
            run(model)  # here the gate is read, and open
            model(residual, start_at_layer=1)

    with pytest.raises(InterventionError, match="was not reached in this pass"):
        skips_the_gate()


@kinds
def test_passes_that_start_and_stop_at_a_layer_are_seen(kind: str) -> None:
    model = fresh(kind, "llama")
    with torch.no_grad(), plan_at(positions="last_prompt").hooks(model) as report:
        whole, part = run(model), run(model, IDS[:, :4])
        residual = model(IDS, stop_at_layer=1)
        try:
            found = model(residual[:, :4], start_at_layer=1), model(residual, start_at_layer=1)
        except NotImplementedError:
            pytest.skip("a Bridge of this version cannot start at a layer")
    torch.testing.assert_close(found[0], part, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], whole, atol=1e-5, rtol=0)
    assert report.n_edited == {HOOK: 4}


@kinds
def test_what_an_intervention_returns_is_checked(kind: str) -> None:
    host = as_host(shared_model(kind))
    batch = host.tokenize(PROMPTS)
    for fn, words in (
        (lambda x: x[:, :-1], r"changed the shape from \(4, 11, 32\) to \(4, 10, 32\)"),
        (lambda x: x.double(), "changed the dtype from torch.float32 to torch.float64"),
        (lambda x: "no", "returned str, not a tensor"),
    ):
        with pytest.raises(InterventionError, match=words), host.intervene({HOOK: fn}):
            host.forward(batch)
    with pytest.raises(HookNameError, match=r"hook_pattern' carries \(4, 2, 11, 11\)"):
        with host.intervene({"blocks.1.attn.hook_pattern": lambda x: None}):
            host.forward(batch)


@kinds
def test_gradients_flow_through_an_intervention(kind: str) -> None:
    host = as_host(shared_model(kind))
    v = direction().requires_grad_(True)
    with host.intervene({HOOK: lambda x: x + v}):
        host.forward(host.tokenize(PROMPTS)).log_softmax(-1)[:, -1, 5].sum().backward()
    assert v.grad is not None
    assert v.grad.norm() > 1e-4
    assert abs(float(v.grad.sum())) < 1e-3 * float(
        v.grad.norm()
    )  # pre-LayerNorm: none along the mean


@kinds
def test_training_mode_matters_where_there_is_dropout(kind: str) -> None:
    model = fresh(kind)
    model.train()
    if kind.startswith("hooked"):  # no dropout anywhere, and "training" is how it comes
        assert capture(model, PROMPTS).n == 4
        return
    for use in (
        lambda: capture(model, PROMPTS),
        lambda: as_host(model).forward(as_host(model).tokenize(PROMPTS)),
        lambda: as_host(model).generate(PROMPTS, max_new_tokens=1),
        lambda: plan_at().attach(model),
    ):
        with pytest.raises(ModelStateError, match=r"is in training mode.*call model\.eval"):
            use()
    model.eval()
    assert capture(model, PROMPTS).n == 4


@kinds
def test_activation_patching_works_inside_a_plan(kind: str) -> None:
    from transformer_lens import patching

    model = fresh(kind)
    model.run_with_cache(IDS)
    run(model)
    count = hook_count(model)
    other = ids_of([1, 5, 9, 19, 6, 8])
    with torch.no_grad(), plan_at().hooks(model):
        _, clean = model.run_with_cache(IDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patched = patching.get_act_patch_resid_pre(
                model, other, clean, lambda logits: logits[0, -1, 5]
            )
        corrupted = run(model, other)

        def patch(x: Tensor) -> Tensor:
            return torch.cat([x[:, :5], clean["blocks.2.hook_resid_pre"][:, 5:]], dim=1)

        with as_host(model).intervene({"blocks.2.hook_resid_pre": patch}):
            want = run(model, other)
    assert patched.shape == (3, 6)
    torch.testing.assert_close(patched[2, 5], want[0, -1, 5], atol=1e-5, rtol=0)
    assert (patched[2, 5] - corrupted[0, -1, 5]).abs() > 1e-2
    assert hook_count(model) == count


# -- basis and fingerprint ------------------------------------------------------------------------


@families
@kinds
def test_the_basis_is_measured_and_processing_does_not_change_what_is_captured(
    kind: str, family: str
) -> None:
    host, plain = as_host(shared_model(kind, family)), shared_model("bridge", family)
    assert host.basis == ("centred" if family in ("gpt2", "neox") else "raw")
    ours, reference = capture(host.model, PROMPTS), capture(plain, PROMPTS)
    for name in reference:
        torch.testing.assert_close(ours[name], reference[name], atol=5e-5, rtol=0)
    if host.basis == "centred":
        assert reference[HOOK].mean(1).abs().max() < 1e-5
    else:
        assert reference[HOOK].mean(1).abs().max() > 1e-2


def test_raw_activations_of_a_layernorm_model_do_depend_on_processing() -> None:
    raw = shared_model("bridge").run_with_cache(IDS, names_filter=[HOOK])[1][HOOK]
    processed = shared_model("bridge compat").run_with_cache(IDS, names_filter=[HOOK])[1][HOOK]
    assert (raw - processed).abs().max() > 1e-2


def test_a_post_layernorm_model_is_raw_although_it_has_layernorm() -> None:
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    hf = transformers.BertForMaskedLM(config).eval()
    for parameter in hf.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    hf.config.architectures = ["BertForMaskedLM"]
    model = TransformerBridge.boot_transformers(
        "tiny-bert", hf_model=hf, tokenizer=models.tokenizer(), device="cpu"
    )
    assert as_host(model).basis == "raw"
    assert capture(model, PROMPTS, [HOOK]).n == 4


@pytest.mark.parametrize(
    "edit", ["add", "add_relative", "add_contextual", "ablate", "rescale", "clamp"]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@kinds
def test_one_plan_has_one_effect_whatever_the_weight_processing(
    kind: str, family: str, edit: str
) -> None:
    """A direction with a mean of its own: in centred coordinates only its mean-free part counts, on
    every class."""
    strengths = {"add": 5.0, "add_relative": 0.8, "ablate": 1.0, "rescale": 2.0}
    own = {HOOK: models.edit_parameters(edit)}
    plan = plan_at(coefficient=strengths.get(edit, 4.0), edit=edit, parameters=own)
    found = []
    for model in (shared_model(kind, family), shared_model("bridge", family)):
        with plan.hooks(model):
            found.append(run(model).log_softmax(-1))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    assert (found[0] - run(shared_model(kind, family)).log_softmax(-1)).abs().max() > 0.1


@families
@kinds
def test_the_fingerprint_is_that_of_the_weights_not_of_the_class(kind: str, family: str) -> None:
    here, there = as_host(shared_model(kind, family)), as_host(shared_model("bridge", family))
    assert fingerprints_match(here.fingerprint, there.fingerprint)
    others = [f for f in models.FAMILIES if f != family]
    assert not any(
        fingerprints_match(here.fingerprint, as_host(shared_model("bridge", f)).fingerprint)
        for f in others
    )


def test_other_weights_have_another_fingerprint_and_a_change_is_noticed() -> None:
    model = models.bridge("gpt2", seed=1)
    first = as_host(model).fingerprint
    assert not fingerprints_match(first, as_host(shared_model("bridge")).fingerprint)
    with torch.no_grad():
        model.original_model.lm_head._original_component.weight.mul_(-1)
    assert not fingerprints_match(first, as_host(model).fingerprint)


def test_hooks_of_others_do_not_reach_the_measurements() -> None:
    model = models.bridge("gpt2")
    want = as_host(shared_model("bridge")).fingerprint
    with plan_at(coefficient=50.0, basis="raw").hooks(model, allow_mismatch=True):
        assert as_host(model).fingerprint == want
        assert as_host(model).basis == "centred"
        run(model)
    point = model.hook_dict[HOOK]
    assert isinstance(point._forward_hooks, OrderedDict)
    assert not point._forward_hooks


def test_fingerprints_match_up_to_a_few_bits_and_only_in_shape() -> None:
    base = "3x32-" + "0" * 64
    assert fingerprints_match(base, "3x32-" + "0" * 62 + "ff")  # 8 bits
    assert not fingerprints_match(base, "3x32-" + "0" * 61 + "1ff")  # 9 bits
    assert not fingerprints_match(base, "4x32-" + "0" * 64)
    assert not fingerprints_match(base, "something else")


def test_a_model_whose_hooks_are_dead_is_named_not_called_centred() -> None:
    model = models.bridge("gpt2")
    host = as_host(model)
    host.forward = lambda batch, stop_at_layer=None: torch.zeros(2, 24, 96)  # type: ignore[method-assign]
    with pytest.raises(ModelStateError, match="its hooks are dead"):
        _ = host.basis


# -- generation -----------------------------------------------------------------------------------


@families
@kinds
def test_generate_is_the_models_own_greedy_continuation(kind: str, family: str) -> None:
    model = shared_model(kind, family)
    host = as_host(model)
    tokens = host.generate_tokens(PROMPTS, max_new_tokens=4, stop_at_eos=False)
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        ids = host.tokenize([prompt]).input_ids
        for _ in range(4):
            ids = torch.cat([ids, run(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert row == ids[0, -4:].tolist()
    texts = host.generate(PROMPTS, max_new_tokens=4, stop_at_eos=False)
    assert texts == [host.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


@kinds
def test_sampling_needs_a_seed_repeats_and_leaves_the_global_state_alone(kind: str) -> None:
    host = as_host(shared_model(kind, "llama"))
    with pytest.raises(ArgumentError, match="needs a seed"):
        host.generate(PROMPTS, max_new_tokens=2, temperature=1.0)
    state = torch.random.get_rng_state()
    first = host.generate_tokens(PROMPTS, max_new_tokens=6, temperature=2.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == host.generate_tokens(PROMPTS, max_new_tokens=6, temperature=2.0, seed=3)
    assert first != host.generate_tokens(PROMPTS, max_new_tokens=6, temperature=2.0, seed=4)
    assert first != host.generate_tokens(PROMPTS, max_new_tokens=6, seed=3)
    with pytest.raises(ArgumentError, match="max_new_tokens must be an integer"):
        host.generate(PROMPTS, max_new_tokens=0)


@kinds
def test_generation_stops_at_eos_and_keeps_it(kind: str) -> None:
    host = as_host(shared_model(kind, "llama"))
    eos = host.tokenizer.eos_token_id

    def push(x: Tensor) -> Tensor:
        out = x.clone()
        out[..., eos] += 100.0
        return out

    with host.intervene({_unembed_hook(host): push}):
        assert host.generate_tokens(PROMPTS[:1], max_new_tokens=4) == [[eos]]
        assert host.generate_tokens(PROMPTS[:1], max_new_tokens=4, stop_at_eos=False) == [[eos] * 4]
        assert host.generate(PROMPTS[:1], max_new_tokens=4) == [""]


def _unembed_hook(host: Any) -> str:
    if "unembed.hook_out" in host.all_hook_names():
        return "unembed.hook_out"
    pytest.skip("HookedTransformer has no hook point on the logits")
    raise AssertionError


def test_a_native_bridge_without_tokenizer_can_be_steered_on_ids() -> None:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    if not hasattr(TransformerBridge, "boot_native"):
        pytest.skip("this TransformerLens has no native bridges")
    config = TransformerBridgeConfig(
        d_model=32, n_layers=2, n_heads=2, d_head=16, n_ctx=64, d_vocab=96, act_fn="gelu", d_mlp=64
    )
    model = TransformerBridge.boot_native(config).eval()
    with pytest.raises(HostError, match="has no tokenizer"):
        capture(model, PROMPTS)
    plain = run(model)
    with plan_at(positions="last_prompt").hooks(model) as report:
        steered = run(model)
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    assert (steered[:, -1] - plain[:, -1]).abs().max() > 1e-3
    assert report.n_edited == {HOOK: 1}


def test_loading_a_model_installs_nothing(monkeypatch):
    """TransformerLens runs pip where a processor asks for torchvision; that may replace torch."""
    helpers = pytest.importorskip("transformer_lens.model_bridge.sources.transformers.helpers")
    if not hasattr(helpers, "_ensure_torchvision"):
        pytest.skip("this TransformerLens installs nothing by itself")
    commands = []
    monkeypatch.setattr("subprocess.check_call", lambda command, **_: commands.append(command))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # cannot be imported
    with nothing_installed():
        assert not helpers._ensure_torchvision()
    assert commands == []
    assert helpers._ensure_torchvision()  # as it was
    assert "torchvision" in commands[0]
