"""Result of a fit, and the plans made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_list, check_number, unknown_hook
from expertsteer_lens._html import repr_html
from expertsteer_lens._moved import Renamed
from expertsteer_lens.align import Aligner
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text
from expertsteer_lens.errors import ArgumentError, DataError, ModelStateError
from expertsteer_lens.interventions.edits import EditName, find_edit
from expertsteer_lens.interventions.positions import Positions
from expertsteer_lens.learn.rfm import RFM
from expertsteer_lens.measure.calibration import Calibration, calibrate
from expertsteer_lens.measure.context_strength import ContextStrength, fit_context_strength
from expertsteer_lens.measure.placement import Placement, learnt_at, place
from expertsteer_lens.pair.mutual_information import LayerPairMI
from expertsteer_lens.pair.rules import LayerPairs, allowed_targets, find_rule
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.vector import SteeringVector

from .config import ExpertSteerConfig, reading_changes
from .fit_data import FitData, PairKey
from .rehearsal import check_seed
from .steps import Solution, StepLog, solve, takes_gradients

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.hosts import Host


class AbsentModel:
    """Stands where the target was in a fit that was loaded without it: its facts, and an error for
    all that needs weights."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = dict(facts)

    def facts(self) -> dict[str, Any]:
        """See `Host.facts`."""
        return dict(self._facts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._facts:
            return self._facts[name]
        raise ModelStateError(
            f"this fit was loaded without its target ({self._facts.get('name', '?')}), which this "
            "needs; load it with "
            "esl.load(path, target=model)."
        )

    def __repr__(self) -> str:
        return f"AbsentModel({self._facts.get('name', '?')!r})"


@dataclass(frozen=True, eq=False)
class ExpertSteering:
    """Result of a fit: the maps, the layer-pair scores, the directions, and what is kept for
    calibration and test."""

    config: ExpertSteerConfig
    seed: int
    layer_pair_mi: LayerPairMI
    layer_pairs: LayerPairs
    aligners: dict[PairKey, Aligner]
    rfms: dict[PairKey, RFM]
    """RFM per candidate pair, fitted on the expert's states placed in the target's space."""
    target: Host
    """The model to be steered; an `AbsentModel` if the fit was loaded without it."""
    data: FitData
    """What was read: states, and the texts kept apart."""
    gradients: dict[str, Tensor]
    """d metric / d state at each target hook point, summed over positions; empty unless the rule is
    "attribution"."""
    steps: tuple[dict[str, Any], ...]
    """Per step: name, seconds, and its figures."""

    # Names of version 0.1.
    readings = Renamed("data")
    expert_pairs = Renamed("data.expert_pair_states")
    test_texts = Renamed("data.test_texts")

    @property
    def target_pairs(self) -> ActivationStore:
        """The target's own states on the contrast pairs, labelled."""
        return self.data.target_pair_states

    @property
    def target_anchors(self) -> ActivationStore:
        """The target's states on the anchors."""
        return self.data.target_anchor_states

    @property
    def calibration_texts(self) -> tuple[Text, ...]:
        """Neutral texts on which coefficients are calibrated."""
        return self.data.calibration_texts

    @property
    def validation_behaviour(self) -> Behaviour | None:
        """Prompts used for choices."""
        return self.data.validation_behaviour

    @property
    def test_behaviour(self) -> Behaviour | None:
        """Prompts that only `evaluate` reads."""
        return self.data.test_behaviour

    @property
    def provenance(self) -> dict[str, Any]:
        """Names, fingerprints and hashes of what went in."""
        return self.data.provenance

    def direction(self, expert_hook: str, target_hook: str) -> Float[Tensor, " d_target"]:
        """Unit direction in the target's space for one fitted pair, pointing towards the positive
        class."""
        if (expert_hook, target_hook) not in self.rfms:
            known = [f"{e} → {t}" for e, t in self.rfms]
            raise unknown_hook(f"{expert_hook} → {target_hook}", known, "a fitted layer pair")
        return self.rfms[expert_hook, target_hook].direction.clone()

    def refit(
        self,
        config: ExpertSteerConfig | None = None,
        *,
        seed: int | None = None,
        progress: bool | None = False,
        **changes: Any,
    ) -> ExpertSteering:
        """The same states and texts under other settings: no model is run for the states, only for
        the gradients that the rule may ask for.

        Args:
            config: settings; default: those of this fit.
            seed: of gauges, folds and the rule "random"; default: this fit's. The texts stay
                divided as they are.
            progress: show progress bars; None: where standard error is a terminal.
            **changes: fields of the config to replace, e.g. `aligner=AlignerConfig(kind="ridge")`.

        Raises:
            ArgumentError: a change of a field that acts only where models are read
                (`reading`, `held_out`, `validation`; `batch_size` where no pass is run); use
                `ExpertSteer(...).fit` for that.
        """
        settings = (config or self.config).changed(changes)
        passes_are_run = takes_gradients(settings) and not self.gradients
        idle = reading_changes(self.config, settings, passes_are_run=passes_are_run)
        if idle:
            raise ArgumentError(
                f"{idle[0]}={getattr(settings, idle[0])!r} acts only where models are read, and "
                f"refit reads none (this fit was read under {getattr(self.config, idle[0])!r}); "
                "run ExpertSteer(...).fit again, or leave it as it was."
            )
        if takes_gradients(settings):
            self.data.check_tokens_serve(settings)
        seed = self.seed if seed is None else seed
        check_seed(seed)
        same_mi = (
            settings.mi == self.config.mi
            and settings.mi_on == self.config.mi_on
            and seed == self.seed
        )
        log = StepLog()
        found = solve(
            settings,
            seed,
            self.target,
            self.data,
            log,
            progress=progress,
            mi=self.layer_pair_mi if same_mi else None,
            gradients=self.gradients or None,
        )
        return collect(settings, seed, self.target, self.data, found, log)

    def predicted_effect(self, target_hook: str, direction: Float[Tensor, " d_target"]) -> float:
        """First-order effect on the behaviour of adding `direction` at coefficient 1 at every
        position, nats.

        Raises:
            ArgumentError: the fit's rule was not "attribution", so no gradient was taken.
        """
        if target_hook not in self.gradients:
            known = sorted(self.gradients)
            if known:
                raise unknown_hook(target_hook, known, "a hook point with a gradient")
            raise ArgumentError(
                "this fit took no gradients; use PairingConfig(rule='attribution')."
            )
        return self.target_anchors.median_norm(target_hook) * float(
            self.gradients[target_hook] @ direction.double()
        )

    def plan(
        self,
        *,
        layer_pairs: Sequence[PairKey] | None = None,
        coefficient: float | Literal["auto"] = "auto",
        positions: Positions = "all",
        edit: EditName | str = "add",
    ) -> SteeringPlan:
        """A plan that writes the fitted directions into the target.

        Args:
            layer_pairs: (expert hook, target hook) keys among the fitted candidates; default: the
                chosen pairs.
            coefficient: signed, in units of the target layer's median residual norm, shared by all
                layers; or "auto": the largest that keeps the damage to the calibration texts within
                `config.budget`.
            positions: which tokens are *steered*, see `SteeringPlan`; which token was *read* is
                `config.reading`.
            edit: "add" and others, see `SteeringPlan`.

        Raises:
            ArgumentError: `coefficient` is a text other than "auto", or `layer_pairs` is no list of
                pairs of names, or empty.
            HookNameError: a layer pair that was not fitted.
        """
        keys = self.layer_pairs.keys() if layer_pairs is None else _checked_pairs(layer_pairs)
        if isinstance(coefficient, str) and coefficient != "auto":
            raise ArgumentError(f"coefficient must be a number or 'auto', got {coefficient!r}.")
        number = 0.1 if isinstance(coefficient, str) else float(coefficient)
        plan = self._plan_of({key: self.direction(*key) for key in keys}, number, positions, edit)
        if coefficient != "auto":
            return plan
        return self.calibrate(plan).apply(plan)

    def calibrate(self, plan: SteeringPlan, **kwargs: Any) -> Calibration:
        """`calibrate` on this fit's calibration texts and validation behaviour; keywords as there.

        32 texts a pass, whatever `config.batch_size` says: nothing of a pass is kept. Progress is
        shown where standard error is a terminal."""
        settings = {
            "budget": self.config.budget,
            "unit": self.config.budget_unit,
            "behaviour": self.validation_behaviour,
            "batch_size": 32,
            "progress": None,
            **kwargs,
        }
        return calibrate(plan, self.target.model, list(self.calibration_texts), **settings)

    def place(
        self,
        plan: SteeringPlan | None = None,
        *,
        hook_names: Sequence[str] | None = None,
        n_blocks: int = 8,
        **kwargs: Any,
    ) -> Placement:
        """Where in the target the direction is best *written*: measured at several blocks, each
        time at the largest strength within the budget, on this fit's validation behaviour and
        calibration texts. See `measure.place`; keywords as there.

        Args:
            plan: with one vector; default: the chosen layer pair's.
            hook_names: blocks to try; default: `n_blocks` of those that the pairing may choose,
                evenly over the depth. The block where the direction was learnt is tried too.
            n_blocks: how many.
            **kwargs: of `measure.place`.

        Returns:
            The placement: `.plan` of it is calibrated, `.to_pandas()` has a row a block.

        Raises:
            DataError: the fit has no validation prompts; see `ExpertSteer.fit`, `behaviour`.
            ArgumentError: several vectors, or other things that `measure.place` refuses.

        Example:
            `fit.place().plan`
        """
        if self.validation_behaviour is None:
            raise DataError(
                "this fit has no validation prompts, on which a block could be chosen; pass "
                "behaviour=Behaviour(...) to fit, or call measure.place."
            )
        check_number("n_blocks", n_blocks, low=1, integer=True)
        plan = self.plan(coefficient=0.1) if plan is None else plan
        if hook_names is None:
            names = list(self.target_pairs)
            allowed = allowed_targets(len(names), self.config.pairing)
            n = min(n_blocks, len(allowed))
            spread = [allowed[round(i * (len(allowed) - 1) / max(n - 1, 1))] for i in range(n)]
            hook_names = [names[i] for i in spread]
        own = learnt_at(plan.vectors[0])
        names = list(dict.fromkeys([*hook_names, own]))
        unread = [name for name in names if name not in self.target_anchors]
        if unread:
            raise unknown_hook(unread[0], list(self.target_anchors), "the target's states")
        settings = {
            "budget": self.config.budget,
            "unit": self.config.budget_unit,
            "progress": None,
            "median_norms": {name: self.target_anchors.median_norm(name) for name in names},
            **kwargs,
        }
        return place(
            plan,
            self.target.model,
            self.validation_behaviour,
            list(self.calibration_texts),
            **settings,
        )

    def context_strength(self, plan: SteeringPlan, **kwargs: Any) -> ContextStrength:
        """`fit_context_strength` on this fit's validation behaviour and calibration texts; keywords
        as there. `.plan` of the result is the better of both strengths.

        Progress is shown where standard error is a terminal.

        Raises:
            DataError: the fit has no validation prompts; see `ExpertSteer.fit`, `behaviour`.

        Example:
            `fit.context_strength(fit.plan(), n_steps=10).plan`
        """
        if self.validation_behaviour is None:
            raise DataError(
                "this fit has no validation prompts, on which a strength could be learnt; pass "
                "behaviour=Behaviour(...) to fit, or call measure.fit_context_strength."
            )
        settings = {
            "budget": self.config.budget,
            "unit": self.config.budget_unit,
            "progress": None,
            **kwargs,
        }
        return fit_context_strength(
            plan,
            self.target.model,
            self.validation_behaviour,
            list(self.calibration_texts),
            **settings,
        )

    def _plan_of(
        self,
        directions: dict[PairKey, Tensor],
        coefficient: float,
        positions: Positions = "all",
        edit: EditName | str = "add",
    ) -> SteeringPlan:
        # A fraction has no length; every other coefficient is in units of the layer's norm.
        is_length = find_edit(edit).coefficient == "length"
        vectors = [
            SteeringVector(
                hook_name=target_hook,
                direction=direction,
                coefficient=coefficient,
                relative_to="median_norm" if is_length else "unit",
                median_norm=self.target_anchors.median_norm(target_hook) if is_length else None,
                edit=edit,
                provenance=self._pair_facts(expert_hook, target_hook),
            )
            for (expert_hook, target_hook), direction in directions.items()
        ]
        facts = self.target.facts()
        return SteeringPlan(
            vectors=tuple(vectors),
            positions=positions,
            basis=facts.pop("basis"),
            target=facts,
            provenance={**self.provenance, "config": self.config.to_dict(), "seed": self.seed},
        )

    def _pair_facts(self, expert_hook: str, target_hook: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"expert_hook_name": expert_hook}
        key = (expert_hook, target_hook)
        if key in self.rfms:
            facts["rfm_validation_auc"] = self.rfms[key].validation_auc
            facts["aligner"] = asdict(self.aligners[key].quality)
        mi = self.layer_pair_mi
        if expert_hook in mi.expert_hook_names and target_hook in mi.target_hook_names:
            i, j = mi.expert_hook_names.index(expert_hook), mi.target_hook_names.index(target_hook)
            facts["mutual_information"] = float(mi.matrix[i, j])
        return facts

    def to_pandas(self) -> pandas.DataFrame:
        """One row per fitted pair: MI, predicted effect (the rule's score), aligner R², RFM AUC,
        chosen or not."""
        import pandas as pd

        score = {
            (r.expert, r.target): (r.score, r.chosen)
            for r in self.layer_pairs.to_pandas().itertuples()
        }
        rows = []
        for key, rfm in self.rfms.items():
            facts = self._pair_facts(*key)
            rows.append(
                {
                    "expert": key[0],
                    "target": key[1],
                    "mutual_information": facts.get("mutual_information"),
                    "aligner_r2": self.aligners[key].quality.r2,
                    "rfm_validation_auc": rfm.validation_auc,
                    "score": score[key][0] if key in score else None,
                    "chosen": score[key][1] if key in score else False,
                }
            )
        return pd.DataFrame(rows).sort_values(
            "score", ascending=find_rule(self.layer_pairs.rule).lowest_first, ignore_index=True
        )

    def summary(self) -> str:
        """The steps with their time and figures, and the chosen pairs, as text."""
        lines = [
            f"{self.provenance['expert']['name']} → {self.provenance['target']['name']} (seed "
            f"{self.seed})"
        ]
        for step in self.steps:
            figures = ", ".join(f"{k} {v}" for k, v in step.items() if k not in ("step", "seconds"))
            lines.append(f"  {step['step']:<10} {step['seconds']:6.1f} s   {figures}")
        lines += [
            f"  chosen     {p.expert} → {p.target}  ({self.layer_pairs.rule} {p.score:+.3f})"
            for p in self.layer_pairs
        ]
        return "\n".join(lines)

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        chosen = ", ".join(f"{p.expert} → {p.target}" for p in self.layer_pairs)
        kind = self.config.aligner.kind
        return f"ExpertSteering({chosen}; {len(self.rfms)} fitted pairs; aligner {kind})"


def collect(
    config: ExpertSteerConfig,
    seed: int,
    target: Host,
    data: FitData,
    found: Solution,
    log: StepLog,
) -> ExpertSteering:
    """The result of steps that have been run."""
    return ExpertSteering(
        config=config,
        seed=seed,
        target=target,
        data=data,
        steps=tuple(log.steps),
        **found._asdict(),
    )


def _checked_pairs(layer_pairs: Sequence[PairKey]) -> list[PairKey]:
    pairs = check_list("layer_pairs", layer_pairs, of="(expert hook, target hook) keys")
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise ArgumentError(
                f"layer_pairs must hold (expert hook, target hook) keys, got {pair!r}; a single "
                "one is given in a list: [(expert hook, target hook)]."
            )
    if not pairs:
        raise ArgumentError("layer_pairs is empty; leave it out for those that were chosen.")
    return pairs
