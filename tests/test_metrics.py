from __future__ import annotations

import models
import pytest
import torch
from reference import kl_per_token

from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.measure import passes
from expertsteer_lens.measure.intervals import bootstrap_draws, mean_interval
from expertsteer_lens.measure.metrics import (
    NeutralTexts,
    behaviour_and_accuracy,
    behaviour_gradient,
    behaviour_metric,
    choice_accuracy,
    neutral_nll,
    readout_gradient,
    repeated_trigrams,
)
from expertsteer_lens.steer.plan import SteeringPlan

HOOK = "blocks.1.hook_resid_post"
BEHAVIOUR = Behaviour(
    prompts=("the cat is", "once upon a time there was a big dog . it was"),
    positive=(" happy", " very glad"),
    negative=(" sad",),
)
TEXTS = ["the cat ran home", "a dog", "the sun and the moon and the rain"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def host(request):
    return as_host(models.bridge(request.param))


def plan(coefficient: float = 2.0, positions="all", hook: str = HOOK) -> SteeringPlan:
    direction = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(3))
    return SteeringPlan.from_vectors(
        {hook: direction}, coefficient=coefficient, relative_to="unit", positions=positions
    )


def slow_log_prob(host, prompt: str, completion: str) -> float:
    """log p(completion | prompt), one token at a time, one sequence at a time."""
    ids = host.tokenize([prompt + completion]).input_ids
    start = host.tokenize([prompt]).input_ids.shape[1]
    total = 0.0
    for t in range(start, ids.shape[1]):
        with torch.no_grad():
            logits = host.model(ids[:, :t])
        total += float(logits[0, -1].double().log_softmax(-1)[ids[0, t]])
    return total


def test_the_metric_is_the_log_odds_of_the_two_sets_of_completions(host):
    expected = []
    for prompt in BEHAVIOUR.prompts:
        good = torch.tensor([slow_log_prob(host, prompt, c) for c in BEHAVIOUR.positive]).logsumexp(
            0
        )
        bad = torch.tensor([slow_log_prob(host, prompt, c) for c in BEHAVIOUR.negative]).logsumexp(
            0
        )
        expected.append(float(good - bad))
    torch.testing.assert_close(
        behaviour_metric(host, BEHAVIOUR), torch.tensor(expected).double(), atol=1e-4, rtol=0
    )


def test_batching_does_not_change_the_metric(host):
    whole, small = (
        behaviour_metric(host, BEHAVIOUR),
        behaviour_metric(host, BEHAVIOUR, batch_size=1),
    )
    torch.testing.assert_close(whole, small, atol=1e-5, rtol=0)


def test_swapping_the_sides_flips_the_sign(host):
    swapped = Behaviour(
        prompts=BEHAVIOUR.prompts, positive=BEHAVIOUR.negative, negative=BEHAVIOUR.positive
    )
    torch.testing.assert_close(behaviour_metric(host, swapped), -behaviour_metric(host, BEHAVIOUR))


def test_the_gradient_predicts_a_small_step_at_every_layer(host):
    names = host.hook_names()
    gradient = behaviour_gradient(host, BEHAVIOUR, names)
    base = behaviour_metric(host, BEHAVIOUR).mean()
    for name in names:
        step = plan(1e-3, hook=name)
        measured = float(behaviour_metric(host, BEHAVIOUR, plan=step).mean() - base)
        predicted = float(gradient[name] @ step.vectors[0].delta.double())
        assert measured == pytest.approx(predicted, rel=0.05, abs=2e-6)


def test_the_gradient_works_with_frozen_parameters_and_leaves_no_gradients_behind(host):
    parameters = list(host.model.original_model.parameters())
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        frozen = behaviour_gradient(host, BEHAVIOUR, [HOOK])
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    assert float(frozen[HOOK].norm()) > 0
    assert all(p.grad is None for p in parameters)


def test_the_readout_gradient_predicts_a_small_step(host):
    readout = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(5))
    last = host.hook_names()[-1]
    gradient = readout_gradient(host, TEXTS, readout, [HOOK, last])

    def value(p: SteeringPlan | None) -> float:
        total = 0.0
        for text in TEXTS:
            batch = host.tokenize([text])
            seen = []
            with (
                torch.no_grad(),
                host.intervene({last: lambda h, seen=seen: seen.append(h.clone())}),
            ):
                if p is None:
                    host.forward(batch)
                else:
                    with p.hooks(host.model):
                        host.forward(batch)
            total += float(seen[0][0, -1].double() @ (readout / readout.norm()).double())
        return total / len(TEXTS)

    step = plan(1e-2)
    assert value(step) - value(None) == pytest.approx(
        float(gradient[HOOK] @ step.vectors[0].delta.double()), rel=0.05
    )
    # at the last layer itself only the last token matters, and the gradient is the read-out
    torch.testing.assert_close(
        gradient[last], (readout / readout.norm()).double(), atol=1e-6, rtol=0
    )


def test_neutral_nll_counts_real_tokens_only(host):
    rows = neutral_nll(host, TEXTS)
    for text, (nll, count) in zip(TEXTS, rows.tolist(), strict=True):
        ids = host.tokenize([text]).input_ids
        with torch.no_grad():
            log_probs = host.model(ids)[0, :-1].double().log_softmax(-1)
        assert count == ids.shape[1] - 1
        assert nll == pytest.approx(-float(log_probs.gather(1, ids[0, 1:, None]).sum()), abs=1e-4)


def test_kl_is_zero_without_steering_and_positive_with_it(host):
    assert float(kl_per_token(host, TEXTS, plan(0.0))[:, 0].abs().max()) < 1e-6
    steered = kl_per_token(host, TEXTS, plan(2.0))
    assert bool((steered[:, 0] > 0).all())
    assert steered[:, 1].tolist() == host.tokenize(TEXTS).attention_mask.sum(1).tolist()


def test_a_plan_for_generated_tokens_leaves_the_first_half_of_a_neutral_text_alone(host):
    text = ["the sun and the moon and the rain"]
    base, generated = neutral_nll(host, text), neutral_nll(host, text, plan=plan(3.0, "generated"))
    everything = neutral_nll(host, text, plan=plan(3.0))
    assert float(generated[0, 0]) != pytest.approx(float(base[0, 0]), abs=1e-3)
    assert float(generated[0, 0]) != pytest.approx(float(everything[0, 0]), abs=1e-3)


def test_steering_generated_tokens_starts_at_the_last_prompt_token_of_each_row(host):
    steered = behaviour_metric(host, BEHAVIOUR, plan=plan(3.0, "generated"))
    for i, prompt in enumerate(BEHAVIOUR.prompts):
        length = host.tokenize([prompt]).input_ids.shape[1]
        one = BEHAVIOUR.select([i])
        sliced = behaviour_metric(host, one, plan=plan(3.0, slice(length - 1, None)))
        assert float(steered[i]) == pytest.approx(float(sliced[0]), abs=1e-4)


def test_accuracy_is_one_where_a_positive_completion_is_likeliest(host):
    accuracy = choice_accuracy(host, BEHAVIOUR)
    for i, prompt in enumerate(BEHAVIOUR.prompts):
        good = max(slow_log_prob(host, prompt, c) for c in BEHAVIOUR.positive)
        bad = max(slow_log_prob(host, prompt, c) for c in BEHAVIOUR.negative)
        assert accuracy[i] == float(good > bad)


def test_a_metric_that_does_not_depend_on_a_hook_is_refused(host):
    readout = torch.ones(models.D_MODEL)
    with pytest.raises(ArgumentError, match="does not depend on hook"):
        readout_gradient(host, TEXTS, readout, ["unembed.hook_in"])


def test_a_completion_that_adds_no_token_is_refused(host, monkeypatch):
    tokenize = host.tokenize
    monkeypatch.setattr(
        host, "tokenize", lambda texts: tokenize([t.replace("!", "") for t in texts])
    )
    with pytest.raises(DataError, match="'!' of prompt 0 adds no token"):
        behaviour_metric(host, Behaviour(prompts=("the cat",), positive=(" is",), negative=("!",)))


def test_repeated_trigrams_counts_repetition():
    assert repeated_trigrams("a b c d e f") == 0.0
    assert repeated_trigrams("a b c a b c a b c") == pytest.approx(4 / 7)
    assert repeated_trigrams("a b") == 0.0


@pytest.mark.parametrize("cache_bytes", [2**28, 0])
def test_costs_on_neutral_texts_are_those_of_the_single_measures(host, cache_bytes):
    base, steered, kl = (
        neutral_nll(host, TEXTS),
        neutral_nll(host, TEXTS, plan=plan()),
        kl_per_token(host, TEXTS, plan()),
    )
    neutral = NeutralTexts(host, TEXTS, batch_size=2, cache_bytes=cache_bytes)
    rise, divergence = neutral.cost(plan())
    assert neutral.nll == pytest.approx(float(base[:, 0].sum() / base[:, 1].sum()), abs=1e-6)
    assert rise == pytest.approx(
        float((steered[:, 0].sum() - base[:, 0].sum()) / base[:, 1].sum()), abs=1e-6
    )
    assert divergence == pytest.approx(float(kl[:, 0].sum() / kl[:, 1].sum()), abs=1e-6)
    assert neutral.cost(plan(), kl=False) == (rise, None)


def test_metric_and_accuracy_from_one_pass_are_those_of_two(host):
    metric, correct = behaviour_and_accuracy(host, BEHAVIOUR)
    torch.testing.assert_close(metric, behaviour_metric(host, BEHAVIOUR), atol=1e-6, rtol=1e-6)
    assert torch.equal(correct, choice_accuracy(host, BEHAVIOUR))


def test_a_tie_is_no_right_answer_whichever_way_it_is_counted(host, monkeypatch):
    """All tokens equally likely: one completion of each side has one token, so they tie."""
    forward = host.forward
    monkeypatch.setattr(host, "forward", lambda *a, **k: torch.zeros_like(forward(*a, **k)))
    behaviour = Behaviour(("the cat is",), (" happy",), (" sad",))
    metric, correct = behaviour_and_accuracy(host, behaviour)
    assert metric.tolist() == [0.0]
    assert correct.tolist() == choice_accuracy(host, behaviour).tolist() == [0.0]
    assert behaviour_metric(host, behaviour).tolist() == [0.0]


def test_the_interval_is_that_of_resampled_means_widened_for_small_samples():
    from scipy.stats import norm, t

    values = torch.arange(10, dtype=torch.float64)
    draws = bootstrap_draws(10, 200, seed=3)
    again = torch.randint(10, (200, 10), generator=torch.Generator().manual_seed(3))
    assert torch.equal(draws, again)
    means = torch.stack([values[row].mean() for row in again])
    tail = norm.cdf(-((10 / 9) ** 0.5) * t.ppf(0.975, 9))
    expected = (float(means.quantile(tail)), float(means.quantile(1 - tail)))
    assert mean_interval(values, draws) == pytest.approx(expected)
    low, high = mean_interval(torch.tensor([1.0, 3.0]), bootstrap_draws(2, 50, seed=0))
    assert (low, high) == pytest.approx((2 - t.ppf(0.975, 1), 2 + t.ppf(0.975, 1)))
    assert mean_interval(torch.tensor([2.0]), bootstrap_draws(1, 50, seed=0)) == (2.0, 2.0)


@pytest.mark.parametrize("n", [2, 4, 6, 15])
def test_intervals_of_few_values_cover_the_mean_as_often_as_they_say(n):
    """The plain percentile interval covers it in 49, 79, 86 and 93 % of the cases."""
    g = torch.Generator().manual_seed(0)
    covered = 0
    for i in range(300):
        values = torch.randn(n, generator=g, dtype=torch.float64)
        low, high = mean_interval(values, bootstrap_draws(n, 1000, seed=i))
        covered += low <= 0 <= high
    assert covered / 300 > 0.92


def counted_logits(host, monkeypatch) -> list[int]:
    """How many positions each pass asks for."""
    counts: list[int] = []
    logits_at = host.logits_at

    def watched(batch, where):
        counts.append(int(where.sum()))
        return logits_at(batch, where)

    monkeypatch.setattr(host, "logits_at", watched)
    return counts


def test_passes_whose_logits_are_read_are_bounded_by_the_size_of_these(host, monkeypatch):
    """A vocabulary of 262,144 takes a MiB a token: 32 texts at once would take 4 GiB."""
    whole, once = neutral_nll(host, TEXTS), NeutralTexts(host, TEXTS).cost(plan())
    longest = int(host.tokenize(TEXTS).lengths.max())
    monkeypatch.setattr(passes, "LOGITS_BYTES", 4 * host.d_vocab * longest)
    counts = counted_logits(host, monkeypatch)
    torch.testing.assert_close(neutral_nll(host, TEXTS), whole, atol=1e-5, rtol=0)
    assert len(counts) > 1
    assert max(counts) <= longest
    assert NeutralTexts(host, TEXTS).cost(plan()) == pytest.approx(once, abs=1e-5)


def test_the_gradient_needs_logits_of_the_completions_only(host, monkeypatch):
    counts = counted_logits(host, monkeypatch)
    behaviour_gradient(host, BEHAVIOUR, [HOOK])
    lengths = [int(host.tokenize([p]).lengths) for p in BEHAVIOUR.prompts]
    assert sum(counts) == sum(
        int(host.tokenize([prompt + completion]).lengths) - length
        for prompt, length in zip(BEHAVIOUR.prompts, lengths, strict=True)
        for completion in (*BEHAVIOUR.positive, *BEHAVIOUR.negative)
    )


@pytest.mark.parametrize(("cache_bytes", "passes_a_plan"), [(2**30, 1), (0, 2)])
def test_unsteered_log_probabilities_are_made_once_where_they_fit(
    host, monkeypatch, cache_bytes, passes_a_plan
):
    neutral = NeutralTexts(host, TEXTS, cache_bytes=cache_bytes)
    neutral.cost(plan())
    counts = counted_logits(host, monkeypatch)
    neutral.cost(plan(1.0))
    assert len(counts) == passes_a_plan
    counts.clear()
    neutral.cost(plan(1.0), kl=False)
    assert len(counts) == 1
