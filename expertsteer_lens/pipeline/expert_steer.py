"""The four steps in order: capture and align, pair layers, learn directions, hand over a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from expertsteer_lens.align import KINDS, MomentKind
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text
from expertsteer_lens.data.contrast import Behaviour, ContrastPairs
from expertsteer_lens.data.parts import groups_of
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.hosts import as_host, capture

from .config import PRESETS, ExpertSteerConfig, Preset
from .finished import check_finished, keeping
from .fit_data import FitData, FitTexts, divide_texts, read_models, reading_of, spans_to_read
from .fitted import ExpertSteering, collect
from .rehearsal import check_seed, rehearse
from .steps import StepLog, measure_gradients, solve, takes_gradients
from .token_pairs import candidate_pairs, pair_tokens, why_not_tokens

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host

FEWEST_TOKEN_PAIRS = 50
"""With fewer, one state a text says as much."""

__all__ = ["PRESETS", "ExpertSteer", "ExpertSteerConfig"]


class ExpertSteer:
    """ExpertSteer (arXiv 2505.12313) on two loaded models; neither model's weights change.

    Args:
        config: settings of the four steps; default: those of `preset`.
        preset: "anchored" (the default) or "paper"; instead of `config`, not beside it.
        seed: of every random choice in the fit (splits, gauges, folds), an integer in [0, 2^32).

    Raises:
        ArgumentError: both `config` and `preset`, an unknown preset, or a seed that a step cannot
            use.

    Example:
        >>> ExpertSteer(preset="paper", seed=1)
        ExpertSteer(aligner='autoencoder', pairing='min_mi', seed=1)
    """

    def __init__(
        self,
        config: ExpertSteerConfig | None = None,
        *,
        preset: Preset | str | None = None,
        seed: int = 0,
    ) -> None:
        if config is not None and preset is not None:
            raise ArgumentError(
                f"config and preset={preset!r} exclude each other; start from "
                f"ExpertSteerConfig.preset({preset!r}) and change it, or leave one out."
            )
        if config is None:
            config = ExpertSteerConfig.preset("anchored" if preset is None else preset)
        if not isinstance(config, ExpertSteerConfig):
            raise ArgumentError(
                f"config must be an ExpertSteerConfig, got {config!r}; ExpertSteerConfig.from_dict "
                "makes one of a dict."
            )
        check_seed(seed)
        self.config, self.seed = config, seed

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
        progress: bool | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        finished: FitData | None = None,
    ) -> ExpertSteering:
        """Run the four steps.

        Args:
            expert: the model that knows; any host object. May be the target itself (self-steering).
                Or its states, captured elsewhere or earlier with `ExpertSteer(...).capture`, so
                that the two models need never be in memory together.
            target: the model to be steered; any host object.
            pairs: labelled texts. Here as everywhere a text may be a chat (a list of messages, see
                `Chat`): each model is shown it in its own template.
            anchors: unlabelled texts run through both models, which tie the two spaces together;
                default: the texts of `pairs`, without their labels. More and more varied is better;
                let them end where the pairs end (the same kind of last token), since the map is
                fitted on the states that are read.
            behaviour: prompts with completions. Half is used to choose layers and coefficient, half
                kept for `evaluate` (equal prompts in one half). Without it, layers are chosen by a
                read-out of the target (weaker evidence; see `readout_gradient`).
            test_behaviour: prompts kept for `evaluate`; given, all of `behaviour` is used for
                choices, with which it shares no prompt.
            neutral: texts on which steering should change nothing, which measure its damage: every
                other one calibrates the coefficient (from the first on), the rest is kept for
                `evaluate`; given, all anchors are used for fitting, and it may share no text with
                them or with `pairs`. Default: `config.held_out` of the anchors, of those that are
                no texts of `pairs`; where the texts of `pairs` stand in for anchors, of these: the
                map is not fitted on what is held out then, but the direction is learnt from it.
            expert_hook_names: expert hook points; default: the residual after every block.
            target_hook_names: target hook points; default: the residual after every block.
            progress: show progress bars; default: where standard error is a terminal.
            on_step: called with each finished step's figures.
            finished: states read by a fit with these very arguments that was stopped, from
                `Interrupted.finished`; they are not read again.

        Raises:
            Interrupted: the user stopped it after the states were read; `.finished` has them.
            ArgumentError, DataError, HookNameError, WidthError, ModelStateError: the input cannot
                be used; see the message. What can be known before a model is run is said before.
        """
        texts = divide_texts(
            pairs,
            self.config,
            self.seed,
            anchors=anchors,
            behaviour=behaviour,
            test_behaviour=test_behaviour,
            neutral=neutral,
        )
        log = StepLog(on_step)
        target_host = as_host(target)
        source = expert if isinstance(expert, ActivationStore) else as_host(expert)
        target_host.check_ready()
        expert_hooks = list(expert_hook_names or _hooks(source))
        if not isinstance(source, ActivationStore):
            source.check_ready()
            expert_hooks = source.check_hook_names(expert_hooks)
        target_hooks = target_host.check_hook_names(list(target_hook_names or _hooks(target_host)))
        rehearse(
            self.config,
            self.seed,
            expert_hook_names=expert_hooks,
            target_hook_names=target_hooks,
            n_anchors=len(texts.fit_texts),
            labels=pairs.labels,
            # Other hook points than the residual may have other widths.
            same_width=bool(expert_hook_names or target_hook_names)
            or source.d_model == target_host.d_model,
        )
        reading = reading_of(self.config, source, target_host)
        if finished is not None:
            check_finished(
                finished, source, target_host, texts, reading, expert_hooks, target_hooks
            )
        data = finished or read_models(
            source,
            target_host,
            texts,
            self.config,
            expert_hook_names=expert_hooks,
            target_hook_names=target_hooks,
            reading=reading,
            progress=progress,
        )
        log.done(
            "capture",
            pairs=len(pairs),
            anchors=data.target_anchor_states.n,
            expert_layers=len(expert_hooks),
            target_layers=len(target_hooks),
            reading=reading,
        )
        with keeping(data):
            return self._solved(source, target_host, texts, data, log, progress)

    def _solved(
        self,
        source: Any,
        target: Host,
        texts: FitTexts,
        data: FitData,
        log: StepLog,
        progress: bool | None,
    ) -> ExpertSteering:
        """The steps after the states are read."""
        gradients = None
        if takes_gradients(self.config):
            gradients = measure_gradients(self.config, target, data, log, progress)
            if self.config.pair_tokens:
                data = self._with_tokens(source, target, texts, data, gradients, log, progress)
        found = solve(
            self.config, self.seed, target, data, log, progress=progress, gradients=gradients
        )
        return collect(self.config, self.seed, target, data, found, log)

    def _with_tokens(
        self,
        expert: Any,
        target: Host,
        texts: FitTexts,
        data: FitData,
        gradients: Mapping[str, Tensor],
        log: StepLog,
        progress: bool | None,
    ) -> FitData:
        """The data with the moments of token pairs; or as they are, and a step that says why."""
        config = self.config
        reason = why_not_tokens(expert, target)
        if reason is None and not isinstance(KINDS[config.aligner.kind], MomentKind):
            reason = f"aligner kind {config.aligner.kind!r} is fitted on rows"
        moments = None
        if reason is None:
            unlabelled = list(texts.fit_texts)
            groups = groups_of(unlabelled)
            if config.align_on_pairs and texts.anchors is not None:
                # The two texts of a pair are alike, and so one group.
                first = max(groups) + 1
                groups += [first + i // 2 for i in range(len(texts.pairs.texts))]
                unlabelled += texts.pairs.texts
            candidates = candidate_pairs(config, data, gradients)
            moments = pair_tokens(
                expert, target, unlabelled, groups, candidates, config, self.seed, progress=progress
            )
            if moments.n < FEWEST_TOKEN_PAIRS:
                reason = f"only {moments.n} tokens of the anchors end at the same character"
        if reason is not None or moments is None:
            log.done("token pairs", maps_on="one state a text", because=reason)
            return data
        log.done("token pairs", n=moments.n, texts=len(unlabelled), layer_pairs=len(candidates))
        return data.with_tokens(moments, config)

    def capture(
        self,
        expert: Any,
        pairs: ContrastPairs,
        *,
        anchors: Sequence[Text] | None = None,
        hook_names: Sequence[str] | None = None,
        progress: bool | None = None,
        store: str | Path | None = None,
        shard: tuple[int, int] | Literal["auto"] | None = None,
    ) -> ActivationStore:
        """The expert's states that `fit` takes in place of the expert, read as `config.reading`
        says; so that the two models need never be in memory together.

        They hold one state a text, so the maps of such a fit are fitted on one state a text.

        Args:
            expert: the model that knows.
            pairs: as in `fit`.
            anchors: as in `fit`.
            hook_names: where it is read; default: the residual after every block.
            progress: show progress bars; default: where standard error is a terminal.
            store: a folder that the states are written to as they are read, see `capture`.
            shard: which share of several processes to read, see `capture`.
        """
        reading = reading_of(self.config, as_host(expert))
        return capture(
            expert,
            [*pairs.texts, *(anchors or ())],
            hook_names,
            positions=reading,
            spans=spans_to_read(pairs, anchors) if reading == "answer" else None,
            batch_size=self.config.batch_size,
            progress=progress,
            store=store,
            shard=shard,
        )


def _hooks(source: Any) -> list[str]:
    return list(source) if isinstance(source, ActivationStore) else list(source.hook_names())
