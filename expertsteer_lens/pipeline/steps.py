"""Steps 1 to 3 on states that are already read: score layer pairs, align, learn, select. No
mathematics here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from expertsteer_lens._progress import is_shown, progress_bar
from expertsteer_lens.align import Aligner, AlignerGrid
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.learn.rfm import RFM, fit_rfm
from expertsteer_lens.measure.gradients import behaviour_gradient, readout_gradient
from expertsteer_lens.pair.mutual_information import LayerPairMI, layer_pair_mi
from expertsteer_lens.pair.rules import LayerPairs, find_rule, select_layer_pairs

from .choice import choose_on_halves
from .config import ExpertSteerConfig
from .fit_data import FitData, PairKey, labels_of
from .maps import fit_maps, rows_to_align

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


class Solution(NamedTuple):
    """What steps 1 to 3 give."""

    layer_pair_mi: LayerPairMI
    layer_pairs: LayerPairs
    aligners: dict[PairKey, Aligner]
    rfms: dict[PairKey, RFM]
    gradients: dict[str, Tensor]


class StepLog:
    """The finished steps of a fit: name, seconds, figures.

    Args:
        on_step: called with each step as it is finished.
    """

    def __init__(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self._on_step, self._started = on_step, time.perf_counter()

    def done(self, step: str, **figures: Any) -> None:
        """Note that a step has ended now, and how."""
        now = time.perf_counter()
        self.steps.append({"step": step, "seconds": round(now - self._started, 3), **figures})
        self._started = now
        if self._on_step:
            self._on_step(self.steps[-1])


def takes_gradients(config: ExpertSteerConfig) -> bool:
    """Whether the pairing rule asks for the gradient of the behaviour."""
    return find_rule(config.pairing.rule).needs == "effects"


def solve(
    config: ExpertSteerConfig,
    seed: int,
    target: Host,
    data: FitData,
    log: StepLog,
    *,
    progress: bool | None,
    mi: LayerPairMI | None = None,
    gradients: dict[str, Tensor] | None = None,
) -> Solution:
    """Steps 1 to 3; `mi` and `gradients` are measured unless they are given.

    Args:
        config: settings of the steps.
        seed: of gauges, folds and the rule "random".
        target: run only where gradients are measured.
        data: states and texts.
        log: told of every finished step.
        progress: show progress bars; None: where standard error is a terminal.
        mi: scores measured before, under the same settings and seed.
        gradients: of the behaviour, by target hook point, measured before.
    """
    if mi is None:
        mi = _score_pairs(config, seed, data, log, progress)
    if takes_gradients(config) and gradients is None:
        gradients = measure_gradients(
            config,
            target,
            list(data.target_pair_states),
            log,
            progress,
            behaviour=data.validation_behaviour,
            neutral=data.calibration_texts,
            readout=data.readout,
        )
    if takes_gradients(config):
        chosen = _choose_by_attribution(config, seed, data, log, progress, gradients or {})
    else:
        chosen = _choose_by_rule(config, seed, data, log, progress, mi)
    return Solution(mi, *chosen, gradients or {})


def _score_pairs(
    config: ExpertSteerConfig, seed: int, data: FitData, log: StepLog, progress: bool | None
) -> LayerPairMI:
    expert, target, groups = data.states_to_compare(config)
    mi = layer_pair_mi(
        expert,
        target,
        config.mi,
        groups=groups,
        seed=seed,
        progress=is_shown(progress),
    )
    low, high = float(mi.matrix.min()), float(mi.matrix.max())
    log.done(
        "pair",
        estimator=config.mi.estimator,
        on=f"{expert.n} {'texts' if groups is None else 'token pairs'}",
        mi_nats=f"{low:.2f} to {high:.2f}",
        null=f"{float(mi.null_mean.mean()):.3f}",
    )
    return mi


def measure_gradients(
    config: ExpertSteerConfig,
    target: Host,
    names: list[str],
    log: StepLog,
    progress: bool | None,
    *,
    behaviour: Behaviour | None,
    neutral: Sequence[Text],
    readout: Tensor,
) -> dict[str, Tensor]:
    """The gradient of the behaviour at every hook point of the target, `[d_target]`: of the
    validation prompts' completions, or of the read-out on neutral texts where there are none."""
    if behaviour is not None:
        gradients = behaviour_gradient(
            target, behaviour, names, batch_size=config.batch_size, progress=progress
        )
    else:
        gradients = readout_gradient(target, neutral, readout, names, batch_size=config.batch_size)
    log.done(
        "attribute",
        metric="completions" if behaviour is not None else "read-out",
        layers=len(names),
    )
    return gradients


Chosen = tuple[LayerPairs, dict[PairKey, Aligner], dict[PairKey, RFM]]


def _choose_by_rule(
    config: ExpertSteerConfig,
    seed: int,
    data: FitData,
    log: StepLog,
    progress: bool | None,
    mi: LayerPairMI,
) -> Chosen:
    """Pairs first, then maps and directions for these alone."""
    c = config.pairing
    names_e, names_t = list(data.expert_pair_states), list(data.target_pair_states)
    scores = mi.matrix if find_rule(c.rule).needs == "mi" else None
    chosen = select_layer_pairs(names_e, names_t, c, scores=scores, seed=seed)
    expert_rows, target_rows = rows_to_align(config, data)
    grid = AlignerGrid(target_rows, config.aligner, seed=seed)
    aligners = grid.fit(expert_rows, pairs=chosen.keys())
    return chosen, aligners, _learn(config, seed, data, log, progress, aligners)


def _choose_by_attribution(
    config: ExpertSteerConfig,
    seed: int,
    data: FitData,
    log: StepLog,
    progress: bool | None,
    gradients: Mapping[str, Tensor],
) -> Chosen:
    """Maps and directions for the most promising candidates, then the pairs among these."""
    c = config.pairing
    names_e, names_t = list(data.expert_pair_states), list(data.target_pair_states)
    anchors = data.target_anchor_states
    units = {name: gradients[name] * anchors.median_norm(name) for name in gradients}
    aligners = _promising_maps(config, seed, data, units)
    rfms = _learn(config, seed, data, log, progress, aligners)
    known = _told_apart(config, rfms, log)
    scores = torch.full((len(names_e), len(names_t)), torch.nan, dtype=torch.float64)
    for e, t in known:
        effect = float(units[t] @ rfms[e, t].direction.double())
        scores[names_e.index(e), names_t.index(t)] = effect
    chosen = select_layer_pairs(names_e, names_t, c, scores=scores)
    store = data.expert_pair_states
    log.done("stability", **choose_on_halves(store, chosen, aligners, rfms, units, c, seed))
    return chosen, aligners, rfms


def _promising_maps(
    config: ExpertSteerConfig, seed: int, data: FitData, units: Mapping[str, Tensor]
) -> dict[PairKey, Aligner]:
    """The maps whose mapped mean difference predicts the largest effect: `n_candidates` of them.

    One expert layer at a time: never more than n_target + n_candidates maps are held."""
    c, pair_states = config.pairing, data.expert_pair_states
    labels = labels_of(pair_states)
    keep = max(c.n_candidates, c.n_pairs)
    aligners: dict[PairKey, Aligner] = {}
    effects: dict[PairKey, float] = {}
    for fitted in fit_maps(config, seed, data):
        aligners |= fitted
        for key, aligner in fitted.items():
            difference = mean_difference(aligner.encode(pair_states[key[0]]), labels)
            effects[key] = float(units[key[1]] @ difference.double())
        best = sorted(effects, key=lambda k: -effects[k])[:keep]
        aligners = {key: aligners[key] for key in best}
    return aligners


def _told_apart(
    config: ExpertSteerConfig, rfms: Mapping[PairKey, RFM], log: StepLog
) -> list[PairKey]:
    """The pairs whose RFM separates its held-out texts; all, and a step that says so, where these
    are too few."""
    c = config.pairing
    known = [
        k for k, r in rfms.items() if r.validation_auc is None or r.validation_auc >= c.min_auc
    ]
    if len({t for _, t in known}) >= c.n_pairs:
        return known
    log.done(
        "select",
        considered="all pairs",
        because=f"{len(known)} of {len(rfms)} reach min_auc={c.min_auc:g}, too few for "
        f"n_pairs={c.n_pairs}; does the expert know this behaviour?",
    )
    return list(rfms)


def _learn(
    config: ExpertSteerConfig,
    seed: int,
    data: FitData,
    log: StepLog,
    progress: bool | None,
    aligners: Mapping[PairKey, Aligner],
) -> dict[PairKey, RFM]:
    """An RFM for every map, on the expert's labelled states placed in the target's space."""
    quality = [a.quality.r2 for a in aligners.values() if a.quality.r2 is not None]
    shown = f"{min(quality):.2f} to {max(quality):.2f}" if quality else "not anchored"
    log.done(
        "align",
        kind=config.aligner.kind,
        maps=len(aligners),
        on=data.maps_on if data.token_moments is None else f"{data.token_moments.n} token pairs",
        held_out_r2=shown,
    )
    states = data.expert_pair_states
    groups, rfms = data.pair_groups, {}
    for key, aligner in progress_bar(
        list(aligners.items()), "rfm", progress=progress, unit="direction"
    ):
        mapped = aligner.encode(states[key[0]])
        rfms[key] = fit_rfm(mapped, labels_of(states), config.rfm, seed=seed, groups=groups)
    auc = [r.validation_auc for r in rfms.values() if r.validation_auc is not None]
    log.done(
        "learn",
        directions=len(rfms),
        validation_auc=f"{min(auc):.3f} to {max(auc):.3f}" if auc else "-",
    )
    return rfms
