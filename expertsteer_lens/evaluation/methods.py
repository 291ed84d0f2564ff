"""Plans to compare with: each of the size of the plan under test, made from the same data under the
same choices. Where the plan is written to another block than its direction was learnt at
(`measure.place`), so are these.

A method gives directions for layers or layer pairs; the layers are those with the largest predicted
effect on the validation prompts (one backward pass, the same for all). Nothing here reads a test
prompt or a test text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.align import AlignerConfig
from expertsteer_lens.errors import ArgumentError, DataError, SolveError, WidthError
from expertsteer_lens.interventions.edits import find_edit
from expertsteer_lens.learn.directions import (
    expert_minus_base,
    mean_difference,
)
from expertsteer_lens.learn.learners import learn as learn_direction
from expertsteer_lens.learn.rfm import fit_rfm
from expertsteer_lens.measure.gradients import behaviour_gradient
from expertsteer_lens.measure.placement import learnt_at, move
from expertsteer_lens.pair.rules import PairingConfig, allowed_targets, select_layer_pairs
from expertsteer_lens.pipeline.config import ExpertSteerConfig
from expertsteer_lens.pipeline.fit_data import PairKey, labels_of
from expertsteer_lens.pipeline.labelling import best_cut, score_states
from expertsteer_lens.pipeline.maps import fit_maps

if TYPE_CHECKING:
    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.pipeline.fitted import ExpertSteering
    from expertsteer_lens.steer.plan import SteeringPlan
    from expertsteer_lens.steer.vector import SteeringVector

Learner = Callable[[Tensor, Tensor], Tensor]
"""(states `[n, d]`, labels `[n]`) to a unit direction `[d]`."""

LEAST_SQUARES = 1e-6
"""Ridge of the least-squares map, relative to the mean variance: only against singular moments."""


class NotMeasured(Exception):  # noqa: N818 - no mistake of the caller: it becomes a row that says why
    """This method has nothing to offer for this plan; the message says why."""


def with_gradients(fit: ExpertSteering) -> ExpertSteering:
    """The fit with the gradients of its validation prompts, which rules other than attribution do
    not take."""
    if fit.gradients or fit.validation_behaviour is None:
        return fit
    gradients = behaviour_gradient(
        fit.target,
        fit.validation_behaviour,
        list(fit.target_pairs),
        batch_size=fit.config.batch_size,
    )
    return replace(fit, gradients=gradients)


def learner(name: str, fit: ExpertSteering) -> Learner:
    """A way to learn a direction from labelled states: "RFM", "mean difference", "PCA" or "logistic
    probe"."""
    known = {"PCA": "pca"}
    if name == "RFM":
        return partial(_learn_rfm, fit=fit)
    return partial(learn_direction, known.get(name, name), config=fit.config.rfm, seed=fit.seed)


def _learn_rfm(rows: Tensor, labels: Tensor, *, fit: ExpertSteering) -> Tensor:
    config, groups = fit.config.rfm, fit.data.pair_groups
    return fit_rfm(rows, labels, config, seed=fit.seed, groups=groups).direction


def native_plan(fit: ExpertSteering, plan: SteeringPlan, learn: Learner) -> SteeringPlan:
    """The target's own direction from the same labelled texts."""
    store = fit.target_pairs
    names = list(store)
    directions = {
        ("target", names[j]): learn(store[names[j]], labels_of(store))
        for j in allowed_targets(len(names), fit.config.pairing)
    }
    return _at_best_layers(fit, plan, directions)


def mapped_plan(fit: ExpertSteering, plan: SteeringPlan, learn: Learner) -> SteeringPlan:
    """Another learner on the states of the same fit: its aligners, its candidate pairs."""
    states = fit.data.expert_pair_states
    labels = labels_of(states)
    directions = {
        key: learn(aligner.encode(states[key[0]]), labels) for key, aligner in fit.aligners.items()
    }
    return _at_best_layers(fit, plan, directions)


def realigned_plan(fit: ExpertSteering, plan: SteeringPlan, kind: str) -> SteeringPlan:
    """The same four steps with another aligner, layer pairs by attribution.

    Raises:
        NotMeasured: that aligner cannot be fitted on these models.
    """
    pairing = replace(_pairing(fit, plan), rule="attribution")
    return _refitted_plan(fit, plan, aligner=AlignerConfig(kind=kind), pairing=pairing)


def paper_plan(fit: ExpertSteering, plan: SteeringPlan, seed: int) -> SteeringPlan:
    """Reconstruction-only auto-encoder in the gauge of `seed`, pairs of lowest mutual information,
    RFM."""
    pairing = replace(_pairing(fit, plan), rule="min_mi")
    config = ExpertSteerConfig.preset("paper")
    return _refitted_plan(
        fit,
        plan,
        aligner=config.aligner,
        align_on_pairs=config.align_on_pairs,
        mi_on=config.mi_on,
        pairing=pairing,
        seed=seed,
    )


def _refitted_plan(fit: ExpertSteering, plan: SteeringPlan, **changes: Any) -> SteeringPlan:
    """What another fit of the same states chose."""
    try:
        again = fit.refit(**changes)
    except (ArgumentError, DataError, SolveError, WidthError) as error:
        # Settings that nobody asked for: no error of the caller.
        raise NotMeasured(str(error).rstrip(".")) from error
    directions = {
        (p.expert, p.target): again.direction(p.expert, p.target) for p in again.layer_pairs
    }
    return _redirect(fit, plan, directions)


def least_squares_plan(fit: ExpertSteering, plan: SteeringPlan) -> SteeringPlan:
    """Mean difference through a least-squares map between the models' states on the anchors
    (L-Cross, arXiv 2503.04429)."""
    states = fit.data.expert_pair_states
    labels = labels_of(states)
    config = AlignerConfig(kind="ridge", ridge=LEAST_SQUARES, n_folds=fit.config.aligner.n_folds)
    directions = {}
    try:
        for maps in fit_maps(fit.config, fit.seed, fit.data, config):
            for key, aligner in maps.items():
                directions[key] = mean_difference(aligner.encode(states[key[0]]), labels)
    except ArgumentError as error:
        raise NotMeasured(str(error).rstrip(".")) from error
    return _at_best_layers(fit, plan, directions)


def few_labels_plan(
    fit: ExpertSteering, plan: SteeringPlan, labeller: str | None, seed: int
) -> SteeringPlan:
    """The target's own mean difference where only one of the fit's pairs is labelled.

    Args:
        fit: its pairs' texts are all there is, one pair of them with its labels.
        plan: the plan under test.
        labeller: "expert" or "self" (the target) labels the others, as `label_texts` does; None:
            they are left out.
        seed: which pair; pairs come in a drawn order, each once.

    Raises:
        NotMeasured: the labeller finds nothing that divides the texts.
    """
    target = fit.target_pairs
    labels = labels_of(target)
    n = int(labels.sum())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(fit.seed))
    given = torch.stack([(labels == side).nonzero()[order[seed % n], 0] for side in (1, 0)])
    rows, found = given, labels[given]
    if labeller is not None:
        states = fit.data.expert_pair_states if labeller == "expert" else target
        names = list(states)[1:-1] or list(states)
        layers = [states[name] for name in names]
        try:
            scores = score_states([x[given] for x in layers], labels[given].float(), layers)
        except DataError as error:
            raise NotMeasured(str(error).rstrip(".")) from error
        rows, found = torch.arange(len(labels)), (scores > best_cut(scores)).to(labels)
        found[given] = labels[given]
    names = list(target)
    directions = {
        ("target", names[j]): mean_difference(target[names[j]][rows], found)
        for j in allowed_targets(len(names), fit.config.pairing)
    }
    return _at_best_layers(fit, plan, directions)


def shuffled_plan(fit: ExpertSteering, plan: SteeringPlan, seed: int) -> SteeringPlan:
    """RFM on permuted labels, at the plan's own layer pairs.

    Raises:
        NotMeasured: the plan does not come from this fit.
    """
    states = fit.data.expert_pair_states
    labels = labels_of(states)
    permuted = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    directions = {}
    for vector in plan.vectors:
        key = (str(vector.provenance.get("expert_hook_name")), learnt_at(vector))
        if key not in fit.aligners:
            raise NotMeasured("the plan does not come from this fit")
        mapped = fit.aligners[key].encode(states[key[0]])
        directions[key] = fit_rfm(
            mapped, permuted, fit.config.rfm, seed=seed, groups=fit.data.pair_groups
        ).direction
    return _redirect(fit, plan, directions)


def wrong_layer_plan(fit: ExpertSteering, plan: SteeringPlan) -> SteeringPlan:
    """The plan's directions, each written to the allowed target layer farthest from its own.

    Raises:
        NotMeasured: no layer is free, or the plan steers a hook point that the fit did not read.
    """
    names = list(fit.target_pairs)
    unread = [v.hook_name for v in plan.vectors if v.hook_name not in names]
    if unread:
        raise NotMeasured(f"the plan steers {unread[0]!r}, which this fit did not read")
    steered = {v.hook_name for v in plan.vectors}
    allowed = [names[j] for j in allowed_targets(len(names), fit.config.pairing)]
    free = [name for name in allowed if name not in steered]
    if len(free) < len(plan.vectors):
        raise NotMeasured(
            f"{len(free)} of {len(allowed)} allowed target layers are free for "
            f"{len(plan.vectors)} vectors"
        )
    vectors = []
    for vector in plan.vectors:
        distance = {n: abs(names.index(n) - names.index(vector.hook_name)) for n in free}
        there = max(free, key=distance.__getitem__)
        free.remove(there)
        is_share = vector.relative_to == "median_norm"
        norm = fit.target_anchors.median_norm(there) if is_share else None
        moved = replace(_unlearnt(vector), hook_name=there, median_norm=norm, provenance={})
        vectors.append(moved)
    return replace(plan, vectors=tuple(vectors))


def base_plan(fit: ExpertSteering, plan: SteeringPlan, base: ActivationStore) -> SteeringPlan:
    """Expert minus its base model on the positive texts, through this fit's maps (UNLOCK, arXiv
    2604.06377).

    Args:
        fit: its aligners carry the difference over.
        plan: the plan under test.
        base: states of the base model on the texts of the fit's contrast pairs, at the expert's
            hook points.

    Raises:
        ArgumentError: `base` lacks a hook point.
    """
    states = fit.data.expert_pair_states
    positive = labels_of(states) == 1
    directions = {}
    for key, aligner in fit.aligners.items():
        if key[0] not in base:
            raise ArgumentError(
                f"base has no states at {key[0]!r}; capture it at the expert's hook points."
            )
        difference = expert_minus_base(states[key[0]][positive], base[key[0]][positive])
        carried = aligner.encode_direction(difference)
        directions[key] = carried / carried.norm()
    return _at_best_layers(fit, plan, directions)


def _at_best_layers(
    fit: ExpertSteering, plan: SteeringPlan, directions: Mapping[PairKey, Tensor]
) -> SteeringPlan:
    """As many directions as the plan has vectors, at distinct target layers, largest predicted
    effect first.

    Without gradients (a fit by another rule that has no validation prompts): the candidates nearest
    to the plan's layers."""
    names = list(fit.target_pairs)
    if fit.gradients:
        there = _written_to(plan)
        effect = {key: fit.predicted_effect(there or key[1], v) for key, v in directions.items()}
    else:
        learnt = [learnt_at(v) for v in plan.vectors]
        at = [names.index(name) for name in learnt if name in names] or [0]
        effect = {key: -min(abs(names.index(key[1]) - i) for i in at) for key in directions}
    experts = list(dict.fromkeys(key[0] for key in directions))
    scores = torch.full((len(experts), len(names)), torch.nan, dtype=torch.float64)
    for (e, t), value in effect.items():
        scores[experts.index(e), names.index(t)] = value
    pairing = replace(_pairing(fit, plan), rule="attribution")
    chosen = select_layer_pairs(experts, names, pairing, scores=scores)
    keys = [(p.expert, p.target) for p in chosen]
    return _redirect(fit, plan, {key: directions[key] for key in keys})


def _redirect(
    fit: ExpertSteering, plan: SteeringPlan, directions: Mapping[PairKey, Tensor]
) -> SteeringPlan:
    """The plan's edit, gate and positions with other directions at other layers."""
    template = _unlearnt(plan.vectors[0])
    relative = template.relative_to == "median_norm"
    vectors = tuple(
        replace(
            template,
            hook_name=hook,
            direction=direction,
            median_norm=fit.target_anchors.median_norm(hook) if relative else None,
            provenance={"expert_hook_name": expert},
        )
        for (expert, hook), direction in directions.items()
    )
    there = _written_to(plan)
    if there is not None:
        norm = fit.target_anchors.median_norm(there)
        vectors = tuple(move(vector, there, norm) for vector in vectors)
    return replace(plan, vectors=vectors, provenance={})


def _written_to(plan: SteeringPlan) -> str | None:
    """The block of a plan that was placed; None where directions are written where they were
    learnt."""
    moved = [v.hook_name for v in plan.vectors if learnt_at(v) != v.hook_name]
    return moved[0] if moved else None


def _unlearnt(vector: SteeringVector) -> SteeringVector:
    """The vector without parameters of its own, which mean nothing at another hook point or along
    another direction.

    Raises:
        NotMeasured: its edit is nothing without them.
    """
    edit = find_edit(vector.edit)
    if not edit.parameters:
        return vector
    if edit.without_parameters is None:
        raise NotMeasured(
            f"the parameters of edit={vector.edit!r} belong to the plan's own directions"
        )
    return replace(vector, edit=edit.without_parameters, parameters={})


def _pairing(fit: ExpertSteering, plan: SteeringPlan) -> PairingConfig:
    return replace(fit.config.pairing, n_pairs=len(plan.vectors))
