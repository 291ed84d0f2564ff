"""What a plan is compared with: each method makes a plan of the same size from the same data and
the same choices.

A method gives directions for layers or layer pairs; the layers are those with the largest predicted
effect on the validation prompts (one backward pass, the same for all), the strength is the largest
within the budget on the calibration texts. Nothing here reads a test prompt or a test text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertsteer_lens.align import AlignerConfig, fit_aligner_grid
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.learn.directions import (
    expert_minus_base,
    logistic_probe,
    mean_difference,
    pca_direction,
)
from expertsteer_lens.learn.rfm import fit_rfm
from expertsteer_lens.measure.metrics import behaviour_gradient
from expertsteer_lens.pair.rules import PairingConfig, allowed_targets, select_layer_pairs

if TYPE_CHECKING:
    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.pipeline.fitted import ExpertSteering, PairKey
    from expertsteer_lens.steer.plan import SteeringPlan

Learner = Callable[[Tensor, Tensor], Tensor]
"""(states `[n, d]`, labels `[n]`) to a unit direction `[d]`."""

EXPERT_ALIGNERS = ("anchored_autoencoder", "ridge", "procrustes", "autoencoder", "identity")
LEAST_SQUARES = 1e-6
"""Ridge of the least-squares map, relative to the mean variance: only against singular moments."""


FLOOR = "random (same budget)"
NATIVE = {  # method: learner, role
    "native RFM": ("RFM", "ceiling"),
    "native mean difference (CAA)": ("mean difference", "ceiling"),
    "native PCA (RepE)": ("PCA", "baseline"),
    "native logistic probe (ITI)": ("logistic probe", "baseline"),
}


@dataclass(frozen=True)
class Job:
    """One steering to be made and measured."""

    method: str
    role: str
    seed: int
    make: Callable[[], SteeringPlan | None]
    calibrate: bool = True


def comparison(
    plan: SteeringPlan,
    fit: ExpertSteering | None,
    *,
    everything: bool,
    n_random: int,
    n_shuffles: int,
    base: ActivationStore | None = None,
    seed: int = 0,
) -> list[Job]:
    """The plan and all it is compared with, as work still to be done; see `evaluate`."""
    jobs = [Job("this plan", "plan", 0, lambda: plan, calibrate=False)]
    for s in range(seed, seed + n_random):
        drawn = plan.with_random_directions(seed=s)
        jobs.append(Job("random (same norm)", "control", s, lambda p=drawn: p, calibrate=False))  # type: ignore[misc]
        jobs.append(Job(FLOOR, "floor", s, lambda p=drawn: p))  # type: ignore[misc]
    if fit is None:
        return jobs
    fit = _with_gradients(fit)
    for s in range(seed, seed + n_shuffles):
        jobs.append(
            Job("label-shuffled RFM", "control", s, lambda s=s: shuffled_plan(fit, plan, s))
        )  # type: ignore[misc]
    jobs.append(Job("wrong layer", "control", 0, lambda: wrong_layer_plan(fit, plan)))
    for name, (how, role) in NATIVE.items():
        if role == "ceiling" or everything:
            learn = learner(how, fit)
            jobs.append(Job(name, role, 0, lambda learn=learn: native_plan(fit, plan, learn)))  # type: ignore[misc]
    if base is not None:
        jobs.append(
            Job("expert minus base (UNLOCK)", "baseline", 0, lambda: base_plan(fit, plan, base))
        )
    if not everything:
        return jobs
    own = fit.config.aligner.kind
    mean = learner("mean difference", fit)
    jobs.append(
        Job(f"{own} + mean difference", "baseline", 0, lambda: mapped_plan(fit, plan, mean))
    )
    same_width = fit.expert_pairs.d_model == fit.target_pairs.d_model
    for kind in EXPERT_ALIGNERS:
        if kind != own and (same_width or kind != "identity"):
            jobs.append(
                Job(
                    f"{kind} + RFM",
                    "baseline",
                    0,
                    lambda kind=kind: realigned_plan(fit, plan, kind),
                )
            )  # type: ignore[misc]
    jobs.append(
        Job(
            "least squares + mean difference (L-Cross)",
            "baseline",
            0,
            lambda: least_squares_plan(fit, plan),
        )
    )
    for s in (fit.seed, fit.seed + 1):
        jobs.append(Job("paper preset", "baseline", s, lambda s=s: paper_plan(fit, plan, s)))  # type: ignore[misc]
    return jobs


def _with_gradients(fit: ExpertSteering) -> ExpertSteering:
    """The fit with the gradients of its validation prompts, which rules other than attribution do
    not take."""
    if fit.gradients or fit.validation_behaviour is None:
        return fit
    found = behaviour_gradient(
        fit.target,
        fit.validation_behaviour,
        list(fit.target_pairs),
        batch_size=fit.config.batch_size,
    )
    return replace(fit, gradients=found)


def learner(name: str, fit: ExpertSteering) -> Learner:
    """A way to learn a direction from labelled states: "RFM", "mean difference", "PCA" or "logistic
    probe"."""
    table: Mapping[str, Learner] = {
        "RFM": lambda x, y: fit_rfm(x, y, fit.config.rfm, seed=fit.seed).direction,
        "mean difference": mean_difference,
        "PCA": lambda x, y: pca_direction(x, y, paired=True),
        "logistic probe": logistic_probe,
    }
    return table[name]


def native_plan(fit: ExpertSteering, plan: SteeringPlan, learn: Learner) -> SteeringPlan:
    """The target's own direction from the same labelled texts."""
    store = fit.target_pairs
    names = list(store)
    found = {
        ("target", names[j]): learn(store[names[j]], _labels(store))
        for j in allowed_targets(len(names), fit.config.pairing)
    }
    return _placed(fit, plan, found)


def mapped_plan(fit: ExpertSteering, plan: SteeringPlan, learn: Learner) -> SteeringPlan:
    """Another learner on the states of the same fit: its aligners, its candidate pairs."""
    labels = _labels(fit.expert_pairs)
    return _placed(
        fit,
        plan,
        {key: learn(a.encode(fit.expert_pairs[key[0]]), labels) for key, a in fit.aligners.items()},
    )


def realigned_plan(fit: ExpertSteering, plan: SteeringPlan, kind: str) -> SteeringPlan:
    """The same four steps with another aligner, layer pairs by attribution."""
    pairing = replace(_pairing(fit, plan), rule="attribution")
    return _refitted_plan(fit, plan, fit.refit(aligner=AlignerConfig(kind=kind), pairing=pairing))


def least_squares_plan(fit: ExpertSteering, plan: SteeringPlan) -> SteeringPlan:
    """Mean difference through a least-squares map between the models' states on the anchors
    (L-Cross, arXiv 2503.04429)."""
    readings, labels = fit.readings, _labels(fit.expert_pairs)
    names = list(fit.target_pairs)
    allowed = [names[j] for j in allowed_targets(len(names), fit.config.pairing)]
    keys = [(e, t) for e in fit.expert_pairs for t in allowed]
    config = AlignerConfig(kind="ridge", ridge=LEAST_SQUARES)
    maps = fit_aligner_grid(
        readings.expert_anchors, readings.target_anchors, config, seed=fit.seed, pairs=keys
    )
    found = {
        key: mean_difference(maps[key].encode(fit.expert_pairs[key[0]]), labels) for key in keys
    }
    return _placed(fit, plan, found)


def paper_plan(fit: ExpertSteering, plan: SteeringPlan, seed: int) -> SteeringPlan:
    """Reconstruction-only auto-encoder in the gauge of `seed`, pairs of lowest mutual information,
    RFM."""
    pairing = replace(_pairing(fit, plan), rule="min_mi")
    return _refitted_plan(
        fit, plan, fit.refit(aligner=AlignerConfig(kind="autoencoder"), pairing=pairing, seed=seed)
    )


def _refitted_plan(fit: ExpertSteering, plan: SteeringPlan, other: ExpertSteering) -> SteeringPlan:
    """What another fit of the same readings chose."""
    return _redirected(
        fit,
        plan,
        {(p.expert, p.target): other.direction(p.expert, p.target) for p in other.layer_pairs},
    )


def shuffled_plan(fit: ExpertSteering, plan: SteeringPlan, seed: int) -> SteeringPlan | None:
    """RFM on permuted labels, at the plan's own layer pairs; None if the plan does not come from
    this fit."""
    labels = _labels(fit.expert_pairs)
    permuted = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    found = {}
    for vector in plan.vectors:
        key = (str(vector.provenance.get("expert_hook_name")), vector.hook_name)
        if key not in fit.aligners:
            return None
        mapped = fit.aligners[key].encode(fit.expert_pairs[key[0]])
        found[key] = fit_rfm(mapped, permuted, fit.config.rfm, seed=seed).direction
    return _redirected(fit, plan, found)


def wrong_layer_plan(fit: ExpertSteering, plan: SteeringPlan) -> SteeringPlan | None:
    """The plan's directions, each written to the allowed target layer farthest from its own; None
    if none is free."""
    names = list(fit.target_pairs)
    free = [names[j] for j in allowed_targets(len(names), fit.config.pairing)]
    free = [n for n in free if n not in {v.hook_name for v in plan.vectors}]
    if len(free) < len(plan.vectors) or any(v.hook_name not in names for v in plan.vectors):
        return None
    vectors = []
    for vector in plan.vectors:
        here = names.index(vector.hook_name)
        there = max(free, key=lambda n, here=here: abs(names.index(n) - here))  # type: ignore[misc]
        free.remove(there)
        norm = fit.target_anchors.median_norm(there)
        vectors.append(replace(vector, hook_name=there, median_norm=norm, provenance={}))
    return replace(plan, vectors=tuple(vectors))


def base_plan(fit: ExpertSteering, plan: SteeringPlan, base: ActivationStore) -> SteeringPlan:
    """Expert minus its base model on the positive texts, through this fit's maps (UNLOCK, arXiv
    2604.06377).

    Args:
        fit: its aligners carry the difference over.
        plan: the plan under test.
        base: states of the base model on the texts of the fit's contrast pairs, at the expert's
            hook points.
    """
    positive = _labels(fit.expert_pairs) == 1
    found = {}
    for key, aligner in fit.aligners.items():
        if key[0] not in base:
            raise ArgumentError(
                f"base has no states at {key[0]!r}; capture it at the expert's hook points."
            )
        difference = expert_minus_base(fit.expert_pairs[key[0]][positive], base[key[0]][positive])
        carried = aligner.encode_direction(difference)
        found[key] = carried / carried.norm()
    return _placed(fit, plan, found)


def _placed(
    fit: ExpertSteering, plan: SteeringPlan, found: Mapping[PairKey, Tensor]
) -> SteeringPlan:
    """As many directions as the plan has vectors, at distinct target layers, largest predicted
    effect first.

    Without gradients (a fit by another rule that has no validation prompts): the candidates nearest
    to the plan's layers."""
    names = list(fit.target_pairs)
    if fit.gradients:
        effect = {key: fit.predicted_effect(key[1], v) for key, v in found.items()}
    else:
        at = [names.index(v.hook_name) for v in plan.vectors if v.hook_name in names] or [0]
        effect = {key: -min(abs(names.index(key[1]) - i) for i in at) for key in found}
    experts = list(dict.fromkeys(key[0] for key in found))
    scores = torch.full((len(experts), len(names)), torch.nan, dtype=torch.float64)
    for (e, t), value in effect.items():
        scores[experts.index(e), names.index(t)] = value
    chosen = select_layer_pairs(
        experts, names, replace(_pairing(fit, plan), rule="attribution"), scores=scores
    )
    return _redirected(fit, plan, {(p.expert, p.target): found[p.expert, p.target] for p in chosen})


def _redirected(
    fit: ExpertSteering, plan: SteeringPlan, found: Mapping[PairKey, Tensor]
) -> SteeringPlan:
    """The plan's edit, gate and positions with other directions at other layers."""
    template = plan.vectors[0]
    relative = template.relative_to == "median_norm"
    vectors = tuple(
        replace(
            template,
            hook_name=hook,
            direction=direction,
            median_norm=fit.target_anchors.median_norm(hook) if relative else None,
            provenance={"expert_hook_name": expert},
        )
        for (expert, hook), direction in found.items()
    )
    return replace(plan, vectors=vectors, provenance={})


def _pairing(fit: ExpertSteering, plan: SteeringPlan) -> PairingConfig:
    return replace(fit.config.pairing, n_pairs=len(plan.vectors))


def _labels(store: ActivationStore) -> Tensor:
    assert store.labels is not None
    return store.labels
