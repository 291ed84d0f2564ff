"""Passes that begin at the steered layer give the numbers of full passes."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import HostError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.resume import keep_stream, logits_only_at, skip_blocks
from expertsteer_lens.measure.metrics import behaviour_metric, choice_accuracy
from expertsteer_lens.measure.prepared import Completions
from expertsteer_lens.measure.stream_cache import StreamCache

TEXTS = ["the cat ran home", "a happy girl saw the big red house at night", "they smiled"]
BEHAVIOUR = esl.Behaviour(
    prompts=["the cat was", "a boy and a girl", "she is"],
    positive=[[" happy", " very glad"], [" played in the snow"], [" good"]],
    negative=[[" sad"], [" cried", " went home and cried"], [" bad", " angry"]],
)


def host_of(family: str, **options):
    return as_host(models.hf(family, **options), tokenizer=models.tokenizer())


def plan_for(host, hook="blocks.1.hook_resid_post", **options):
    v = torch.randn(host.d_model, generator=torch.Generator().manual_seed(1))
    return esl.SteeringPlan.from_vectors({hook: v}, coefficient=3.0, relative_to="unit", **options)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_a_resumed_pass_is_the_full_pass_to_the_bit(family, n_blocks):
    host = host_of(family)
    batch = host.tokenize(TEXTS)
    with torch.no_grad():
        whole = host.forward(batch)
        kept = host.keep_stream(batch, n_blocks)
        assert kept.stream.shape == (3, batch.input_ids.shape[1], host.d_model)
        with host.resume(kept):
            assert torch.equal(host.forward(batch), whole)
        assert torch.equal(host.forward(batch), whole)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("positions", ["all", "prompt", "last_prompt", "generated", [0, -1]])
def test_a_steered_pass_from_the_layer_is_the_full_steered_pass(family, positions):
    host = host_of(family)
    batch, plan = host.tokenize(TEXTS), plan_for(host_of(family), positions=positions)
    cache = StreamCache(host)
    with torch.no_grad():
        with plan.hooks(host.model, prompt_lengths=[2, 3, 1]):
            whole = host.forward(batch)
        for _ in range(2):
            with cache.steered(batch, plan, [2, 3, 1]):
                assert torch.equal(host.forward(batch), whole)
    assert cache.n_bytes > 0


def test_lower_blocks_are_really_not_run():
    host = host_of("llama")
    batch, ran = host.tokenize(TEXTS), []
    inner = host.model.model.layers[0].self_attn
    kept = host.keep_stream(batch, 2)
    handle = inner.register_forward_hook(lambda *_: ran.append(1))
    try:
        with host.resume(kept), torch.no_grad():
            host.forward(batch)
        assert not ran
        host.forward(batch)
        assert ran
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        (["blocks.2.hook_resid_post"], 3),
        (["blocks.2.hook_resid_pre"], 2),
        (["blocks.0.hook_attn_out"], 0),
        (["blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"], 1),
        (["ln_final.hook_normalized"], 0),
        ([], 0),
    ],
)
def test_how_many_blocks_an_edit_leaves_alone(hooks, expected):
    assert host_of("llama").n_blocks_below(hooks) == expected


@pytest.mark.parametrize("kept_between_passes", [True, False])
def test_a_model_whose_upper_blocks_use_more_than_the_stream_is_run_in_full(kept_between_passes):
    host = host_of("llama")
    lower, upper = host.model.model.layers[0].mlp, host.model.model.layers[2].mlp
    plain_lower, plain_upper, shared = lower.forward, upper.forward, {}

    def remember(x):
        shared["seen"] = plain_lower(x)
        return shared["seen"]

    def use(x):
        seen = shared["seen"] if kept_between_passes else shared.pop("seen")
        return plain_upper(x) + seen

    lower.forward, upper.forward = remember, use
    batch, plan = host.tokenize(TEXTS), plan_for(host)
    with torch.no_grad():
        assert host.keep_stream(batch, 2) is None
        with plan.hooks(host.model):
            whole = host.forward(batch)
        with StreamCache(host).steered(batch, plan):
            assert torch.equal(host.forward(batch), whole)


def test_blocks_are_themselves_again_after_an_error():
    host = host_of("gpt2")
    batch = host.tokenize(TEXTS)
    kept = host.keep_stream(batch, 2)
    with pytest.raises(RuntimeError, match="stop"), host.resume(kept):
        raise RuntimeError("stop")
    blocks = [host.model.get_submodule(p) for p in host.blocks.layers]
    assert all("forward" not in vars(b) for b in blocks)
    own = blocks[0].forward
    blocks[0].forward = lambda *a, **k: own(*a, **k)
    mine = blocks[0].forward
    with skip_blocks(blocks, keep_stream(blocks, 2, lambda: host.forward(batch))):
        pass
    assert vars(blocks[0])["forward"] is mine


def test_a_deep_copy_made_while_blocks_are_skipped_runs_all_of_its_own():
    host = host_of("llama")
    batch, other = host.tokenize(TEXTS), host.tokenize(TEXTS[:1])
    want = host.forward(other)
    with host.resume(host.keep_stream(batch, 2)):
        copied = as_host(copy.deepcopy(host.model), tokenizer=models.tokenizer())
        assert torch.equal(copied.forward(other), want)


def test_a_host_that_cannot_run_from_a_layer_keeps_nothing_and_says_so():
    host = as_host(models.bridge("llama"))
    batch = host.tokenize(TEXTS)
    assert host.keep_stream(batch, 2) is None
    kept = host_of("llama").keep_stream(batch, 2)
    with pytest.raises(
        HostError, match="transformer_lens cannot run a pass from a layer; run full"
    ):
        host.resume(kept)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_logits_where_they_are_read(family):
    host = host_of(family)
    batch = host.tokenize(TEXTS)
    where = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    where[0, 1:3] = where[2, 0] = True
    with torch.no_grad():
        torch.testing.assert_close(host.logits_at(batch, where), host.forward(batch)[where])


class TestPreparedCompletions:
    @pytest.mark.parametrize("family", models.FAMILIES)
    @pytest.mark.parametrize("max_tokens", [8, 2048])
    def test_scores_are_those_of_full_passes(self, family, max_tokens):
        host = host_of(family)
        ready = Completions(host, BEHAVIOUR, max_tokens=max_tokens)
        for plan in (
            None,
            plan_for(host),
            plan_for(host, positions="generated"),
            plan_for(host, "blocks.0.hook_resid_pre"),
        ):
            scores = ready.scores(plan)
            slow = behaviour_metric(host, BEHAVIOUR, plan=plan)
            torch.testing.assert_close(scores.log_odds(), slow, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                scores.correct(), choice_accuracy(host, BEHAVIOUR, plan=plan)
            )

    def test_per_token_is_the_mean_over_the_tokens_of_a_completion(self):
        host = host_of("llama")
        scores = Completions(host, BEHAVIOUR).scores()
        assert scores.n_tokens.tolist() == [1, 2, 1, 4, 1, 4, 1, 1, 1]
        torch.testing.assert_close(scores.per_token * scores.n_tokens, scores.total)
        margin = scores.margin_per_token()
        first = scores.per_token[:2].mean() - scores.per_token[2]
        torch.testing.assert_close(margin[0], first)

    def test_memory_stays_within_what_is_allowed_and_numbers_do_not_change(self):
        host = host_of("llama")
        plan = plan_for(host)
        full = Completions(host, BEHAVIOUR, max_tokens=16)
        none = Completions(host, BEHAVIOUR, max_tokens=16, cache_bytes=0)
        some = Completions(host, BEHAVIOUR, max_tokens=16, cache_bytes=4000)
        expected = full.scores(plan).total
        for ready in (none, some):
            for _ in range(2):
                torch.testing.assert_close(ready.scores(plan).total, expected)
        assert none._cache.n_bytes == 0
        assert 0 < some._cache.n_bytes <= 4000 < full._cache.n_bytes

    def test_one_layer_is_held_at_a_time(self):
        host = host_of("llama")
        ready = Completions(host, BEHAVIOUR)
        sizes = []
        for hook in ("blocks.1.hook_resid_post", "blocks.0.hook_resid_post"):
            ready.scores(plan_for(host, hook))
            sizes.append(ready._cache.n_bytes)
        assert sizes[0] == sizes[1] > 0


def test_skipped_blocks_and_chosen_logits_belong_to_the_thread_that_asked():
    host = host_of("llama")
    batch = host.tokenize(TEXTS)
    where = batch.attention_mask.bool()
    where[:, 1:] = False
    barrier = threading.Barrier(3, timeout=60)

    @torch.no_grad()
    def whole():
        barrier.wait()
        return [host.forward(batch) for _ in range(6)]

    @torch.no_grad()
    def from_block(n_blocks):
        def run():
            kept = host.keep_stream(batch, n_blocks)
            barrier.wait()
            out = []
            for _ in range(6):
                with host.resume(kept):
                    out.append(host.logits_at(batch, where))
            return out

        return run

    with torch.no_grad():
        wanted, chosen = host.forward(batch), host.logits_at(batch, where)
        host.keep_stream(batch, 1), host.keep_stream(batch, 2)  # measured once, and not in threads
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            plain, *rest = [pool.submit(f) for f in (whole, from_block(1), from_block(2))]
            assert all(torch.equal(found, wanted) for found in plain.result())
            for one in rest:
                assert all(torch.equal(found, chosen) for found in one.result())
    assert not any("forward" in block.__dict__ for block in host.model.model.layers)


def test_blocks_are_skipped_in_one_thread_while_another_runs_them():
    host = host_of("llama")
    batch, other = host.tokenize(TEXTS), host.tokenize(["they smiled"])
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread was there before
        wanted = host.forward(other)
        kept = host.keep_stream(batch, 2)
        with host.resume(kept):
            assert torch.equal(pool.submit(host.forward, other).result(), wanted)
        with logits_only_at(host.model.get_output_embeddings(), batch.attention_mask.bool()):
            assert torch.equal(pool.submit(host.forward, other).result(), wanted)
