"""The four steps in order: capture and align, pair layers, learn directions, hand over a plan. No
mathematics here."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.align.fit import Aligner, AlignerConfig, fit_aligner_grid
from expertsteer_lens.align.solvers import Side
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text
from expertsteer_lens.data.contrast import Behaviour, ContrastPairs
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.learn.rfm import RFM, RFMConfig, fit_rfm
from expertsteer_lens.measure.calibration import BUDGET_UNITS
from expertsteer_lens.measure.metrics import behaviour_gradient, readout_gradient
from expertsteer_lens.pair.mutual_information import LayerPairMI, MIConfig, layer_pair_mi
from expertsteer_lens.pair.rules import (
    LayerPairs,
    PairingConfig,
    allowed_targets,
    find_rule,
    select_layer_pairs,
)

from .fit_data import PairKey, Readings, read_models
from .fitted import ExpertSteering

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host

PRESETS = ("anchored", "paper")


@dataclass(frozen=True, kw_only=True)
class ExpertSteerConfig:
    """Settings of the four steps. `ExpertSteerConfig.preset("anchored")` and `.preset("paper")` are
    the two to start from."""

    aligner: AlignerConfig = field(
        default_factory=lambda: AlignerConfig(kind="anchored_autoencoder")
    )
    """Step 1: how expert states are placed in the target's space. Chosen on the validation prompts
    of `benchmarks/real_pair.py`, where it steered further than the other kinds."""
    mi: MIConfig = field(default_factory=MIConfig)
    """Step 2: how layers are compared."""
    pairing: PairingConfig = field(default_factory=PairingConfig)
    """Step 2: which pairs are kept."""
    rfm: RFMConfig = field(default_factory=RFMConfig)
    """Step 3: how directions are learnt."""
    read_positions: str | int = "last"
    """Token whose state represents a text: "last", "mean", or an absolute index."""
    align_on_pairs: bool = False
    """Fit the aligner on the texts of the pairs, without their labels, beside the anchors."""
    batch_size: int = 16
    """Texts per forward pass, and per backward pass of the attribution, which stores a pass of the
    whole target."""
    held_out: float = 0.3
    """Share of the anchors not used for fitting: half of it calibrates the strength, half is kept
    for the evaluation."""
    validation: float = 0.5
    """Share of the behaviour's prompts used for choices; the rest is kept for the evaluation."""
    budget: float = 0.10
    """Largest damage to neutral texts, nats per token, that `coefficient="auto"` accepts."""
    budget_unit: str = "nll"
    """What the budget counts: "nll", the rise of the mean NLL, or "kl", the mean KL to the
    unsteered target."""

    def __post_init__(self) -> None:
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_number("held_out", self.held_out, low=0.0, high=0.9, low_open=True)
        check_number("validation", self.validation, low=0.0, high=1.0, low_open=True)
        check_number("budget", self.budget, low=0.0, low_open=True)
        check_choice("budget_unit", self.budget_unit, BUDGET_UNITS)

    @classmethod
    def preset(cls, name: str) -> ExpertSteerConfig:
        """ "anchored" (default; ours) or "paper" (reconstruction-only auto-encoder, lowest MI;
        depends on its seed)."""
        check_choice("preset", name, PRESETS)
        if name == "paper":
            return cls(
                aligner=AlignerConfig(kind="autoencoder"), pairing=PairingConfig(rule="min_mi")
            )
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExpertSteerConfig:
        """Inverse of `to_dict`; unknown fields raise `ArgumentError`."""
        parts: dict[str, Any] = {
            "aligner": AlignerConfig,
            "mi": MIConfig,
            "pairing": PairingConfig,
            "rfm": RFMConfig,
        }
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ArgumentError(
                f"config has unknown field {unknown[0]!r}; known fields are {sorted(known)}."
            )
        built = {}
        for key, value in data.items():
            if key in parts:
                value = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
                built[key] = parts[key](**value)
            else:
                built[key] = value
        return cls(**built)


class ExpertSteer:
    """ExpertSteer (arXiv 2505.12313) on two loaded models; neither model's weights change.

    Args:
        config: settings of the four steps; default: those of `preset`.
        preset: "anchored" or "paper", used when `config` is not given.
        seed: of every random choice in the fit (splits, gauges, folds).
    """

    def __init__(
        self, config: ExpertSteerConfig | None = None, *, preset: str = "anchored", seed: int = 0
    ) -> None:
        self.config = config if config is not None else ExpertSteerConfig.preset(preset)
        self.seed = seed

    def __repr__(self) -> str:
        kind, rule = self.config.aligner.kind, self.config.pairing.rule
        return f"ExpertSteer(aligner={kind!r}, pairing={rule!r}, seed={self.seed})"

    def fit(
        self,
        expert: Any,
        target: Any,
        pairs: ContrastPairs,
        *,
        anchors: Sequence[Text] | None = None,
        behaviour: Behaviour | None = None,
        test_behaviour: Behaviour | None = None,
        neutral: Sequence[Text] | None = None,
        expert_hook_names: Sequence[str] | None = None,
        target_hook_names: Sequence[str] | None = None,
        progress: bool = True,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> ExpertSteering:
        """Run the four steps.

        Args:
            expert: the model that knows; any host object. May be the target itself (self-steering).
                Or its states, captured elsewhere or earlier: `capture(expert, [*pairs.texts,
                *anchors])`, so that the two models need never be in memory together.
            target: the model to be steered; any host object.
            pairs: labelled texts. Here as everywhere a text may be a chat (a list of messages, see
                `Chat`): each model is shown it in its own template.
            anchors: unlabelled texts run through both models, which tie the two spaces together;
                default: the texts of `pairs`, without their labels. More and more varied is better;
                let them end where the pairs end (the same kind of last token), since the map is
                fitted on the states that are read.
            behaviour: prompts with completions. Half is used to choose layers and strength, half
                kept for `evaluate`. Without it, layers are chosen by a read-out of the target
                (weaker evidence; see `readout_gradient`).
            test_behaviour: prompts kept for `evaluate`; given, all of `behaviour` is used for
                choices.
            neutral: texts that measure the damage of steering: half calibrate the strength, half
                are kept for `evaluate`; given, all anchors are used for fitting. Default:
                `config.held_out` of the anchors.
            expert_hook_names: expert hook points; default: the residual after every block.
            target_hook_names: target hook points; default: the residual after every block.
            progress: show progress bars.
            on_step: called with each finished step's figures.

        Raises:
            DataError, HookNameError, WidthError, ModelStateError: the input cannot be used; see the
                message.
        """
        if test_behaviour is not None and behaviour is None:
            raise ArgumentError(
                "test_behaviour is given without behaviour, the prompts to choose layers by; pass "
                "both."
            )
        run = _Fit(self.config, self.seed, as_host(target), progress, on_step)
        readings = read_models(
            expert if isinstance(expert, ActivationStore) else as_host(expert),
            run.target,
            pairs,
            self.config,
            self.seed,
            anchors=anchors,
            behaviour=behaviour,
            test_behaviour=test_behaviour,
            neutral=neutral,
            expert_hook_names=expert_hook_names,
            target_hook_names=target_hook_names,
            progress=progress,
        )
        run.done(
            "capture",
            pairs=len(pairs),
            anchors=readings.target_anchors.n,
            expert_layers=len(readings.expert_pairs),
            target_layers=len(readings.target_pairs),
        )
        return run.solve(readings)


def solve(
    config: ExpertSteerConfig,
    seed: int,
    target: Host,
    readings: Readings,
    *,
    progress: bool = False,
    mi: LayerPairMI | None = None,
    gradients: dict[str, Tensor] | None = None,
) -> ExpertSteering:
    """Steps 1 to 3 on states that are already read; `mi` and `gradients` are measured unless they
    are given."""
    return _Fit(config, seed, target, progress, None).solve(readings, mi, gradients)


class _Fit:
    """The local state of one fit."""

    def __init__(
        self,
        config: ExpertSteerConfig,
        seed: int,
        target: Host,
        progress: bool,
        on_step: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.config, self.seed, self.target = config, seed, target
        self.progress, self.on_step = progress, on_step
        self.steps: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    def done(self, step: str, **figures: Any) -> None:
        now = time.perf_counter()
        self.steps.append({"step": step, "seconds": round(now - self.started, 3), **figures})
        self.started = now
        if self.on_step:
            self.on_step(self.steps[-1])

    def solve(
        self,
        readings: Readings,
        mi: LayerPairMI | None = None,
        gradients: dict[str, Tensor] | None = None,
    ) -> ExpertSteering:
        c, r = self.config, readings
        if mi is None:
            mi = layer_pair_mi(
                r.expert_anchors, r.target_anchors, c.mi, seed=self.seed, progress=self.progress
            )
            low, high = float(mi.matrix.min()), float(mi.matrix.max())
            null = f"{float(mi.null_mean.mean()):.3f}"
            self.done(
                "pair", estimator=c.mi.estimator, mi_nats=f"{low:.2f} to {high:.2f}", null=null
            )
        if find_rule(c.pairing.rule).needs == "effects" and gradients is None:
            gradients = self.gradients(readings)
        layer_pairs, aligners, rfms = self.choose(readings, mi, gradients or {})
        return ExpertSteering(
            config=c,
            seed=self.seed,
            layer_pair_mi=mi,
            layer_pairs=layer_pairs,
            aligners=aligners,
            rfms=rfms,
            target=self.target,
            readings=readings,
            gradients=gradients or {},
            steps=tuple(self.steps),
        )

    def choose(
        self, readings: Readings, mi: LayerPairMI, gradients: dict[str, Tensor]
    ) -> tuple[LayerPairs, dict[PairKey, Aligner], dict[PairKey, RFM]]:
        """Steps 1 to 3 for the pairs that matter: align, learn, and pick."""
        c, expert_pairs = self.config.pairing, readings.expert_pairs
        target_anchors = readings.target_anchors
        fit_on: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = (
            readings.expert_anchors,
            target_anchors,
        )
        if self.config.align_on_pairs:
            fit_on = (_joined(fit_on[0], expert_pairs), _joined(fit_on[1], readings.target_pairs))
        names_e, names_t = list(expert_pairs), list(readings.target_pairs)
        labels = _labels(expert_pairs)
        needs = find_rule(c.rule).needs
        if needs != "effects":
            scores = mi.matrix if needs == "mi" else None
            chosen = select_layer_pairs(names_e, names_t, c, scores=scores, seed=self.seed)
            maps = self.align(*fit_on, chosen.keys())
            return chosen, maps, self.learn(maps, expert_pairs)
        units = {name: gradients[name] * target_anchors.median_norm(name) for name in gradients}
        allowed = [names_t[j] for j in allowed_targets(len(names_t), c)]
        keep = max(c.n_candidates, c.n_pairs)
        aligners: dict[PairKey, Aligner] = {}
        effects: dict[PairKey, float] = {}
        decomposed: dict[str, Side] = {}
        for hook in (
            names_e
        ):  # one expert layer at a time: never more than n_target + n_candidates maps are held
            aligners |= self.align(*fit_on, [(hook, t) for t in allowed], decomposed)
            for target_hook in allowed:
                mapped = aligners[hook, target_hook].encode(expert_pairs[hook])
                difference = mean_difference(mapped, labels)
                effects[hook, target_hook] = float(units[target_hook] @ difference.double())
            best = sorted(effects, key=lambda k: -effects[k])[:keep]
            aligners = {key: aligners[key] for key in best}
        rfms = self.learn(aligners, expert_pairs)
        known = {
            k for k, r in rfms.items() if r.validation_auc is None or r.validation_auc >= c.min_auc
        }
        if len({t for _, t in known}) < c.n_pairs:
            warnings.warn(
                f"the expert separates the held-out pairs with an AUC of {c.min_auc:g} or more at "
                f"{len(known)} of "
                f"{len(rfms)} layer pairs, too few for n_pairs={c.n_pairs}; others are used too. "
                "Does it know this behaviour?",
                stacklevel=2,
            )
            self.done(
                "select", min_auc=f"{c.min_auc:g} not reached by enough pairs; all were considered"
            )
            known = set(rfms)
        scores = torch.full((len(names_e), len(names_t)), torch.nan, dtype=torch.float64)
        for (e, t), rfm in rfms.items():
            if (e, t) not in known:
                continue
            scores[names_e.index(e), names_t.index(t)] = float(units[t] @ rfm.direction.double())
        return select_layer_pairs(names_e, names_t, c, scores=scores), aligners, rfms

    def gradients(self, readings: Readings) -> dict[str, Tensor]:
        behaviour, names = readings.validation_behaviour, list(readings.target_pairs)
        if behaviour is not None:
            found = behaviour_gradient(
                self.target,
                behaviour,
                names,
                batch_size=self.config.batch_size,
                progress=self.progress,
            )
        else:
            found = readout_gradient(
                self.target,
                readings.calibration_texts,
                readings.readout,
                names,
                batch_size=self.config.batch_size,
            )
        self.done(
            "attribute",
            metric="completions" if behaviour is not None else "read-out",
            layers=len(names),
        )
        return found

    def align(
        self,
        expert_anchors: Mapping[str, Tensor],
        target_anchors: Mapping[str, Tensor],
        keys: Sequence[PairKey],
        decomposed: dict[str, Side] | None = None,
    ) -> dict[PairKey, Aligner]:
        return fit_aligner_grid(
            expert_anchors,
            target_anchors,
            self.config.aligner,
            seed=self.seed,
            pairs=list(keys),
            decomposed=decomposed,
        )

    def learn(
        self, aligners: dict[PairKey, Aligner], expert_pairs: ActivationStore
    ) -> dict[PairKey, RFM]:
        quality = [a.quality.r2 for a in aligners.values() if a.quality.r2 is not None]
        shown = f"{min(quality):.2f} to {max(quality):.2f}" if quality else "not anchored"
        self.done("align", kind=self.config.aligner.kind, maps=len(aligners), held_out_r2=shown)
        from tqdm.auto import tqdm

        rfms = {}
        for key, aligner in tqdm(
            aligners.items(), desc="rfm", disable=not self.progress, leave=False
        ):
            mapped = aligner.encode(expert_pairs[key[0]])
            rfms[key] = fit_rfm(mapped, _labels(expert_pairs), self.config.rfm, seed=self.seed)
        auc = [r.validation_auc for r in rfms.values() if r.validation_auc is not None]
        self.done(
            "learn",
            directions=len(rfms),
            validation_auc=f"{min(auc):.3f} to {max(auc):.3f}" if auc else "-",
        )
        return rfms


def _joined(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name], other[name]]) for name in one}


def _labels(store: ActivationStore) -> Tensor:
    assert store.labels is not None
    return store.labels
