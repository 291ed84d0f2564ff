"""The four steps in order: capture and align, pair layers, learn directions, hand over a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from expertsteer_lens._checks import shown
from expertsteer_lens.align import KINDS, MomentKind
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import ContrastPairs
from expertsteer_lens.data.read_positions import OF_THE_ANSWER
from expertsteer_lens.errors import ArgumentError, HookNameError
from expertsteer_lens.hosts import as_host, capture

from .config import PRESETS, ExpertSteerConfig, Preset
from .experts import Experts
from .finished import check_finished, keeping, read_under
from .fit_data import FitData, FitTexts, divide_texts, reading_of, spans_to_read
from .fitted import ExpertSteering, collect
from .read_models import Models, PairStates
from .readings import FinishedReadings, TextReader
from .rehearsal import check_lengths, check_seed, rehearse
from .steps import StepLog, measure_gradients, solve, takes_gradients
from .token_pairs import TokenPairs, candidate_pairs, in_the_middle, why_not_tokens

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
        finished: FitData | FinishedReadings | None = None,
        expert_tokens: ActivationStore | None = None,
    ) -> ExpertSteering:
        """Run the four steps.

        Args:
            expert: the model that knows; any host object. May be the target itself (self-steering).
                Or its states, captured elsewhere or earlier with `ExpertSteer(...).capture`, so
                that the two models need never be in memory together. Or a list of these: the layers
                of all experts are candidates side by side, under names such as
                `qwen/blocks.12.hook_resid_post`, and `config.pairing` chooses among them.
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
            expert_hook_names: expert hook points; default: the residual after every block. Of
                several experts with the expert's name before them.
            target_hook_names: target hook points; default: the residual after every block.
            progress: show progress bars; default: where standard error is a terminal.
            on_step: called with each finished step's figures.
            finished: states read by a fit with these very arguments that was stopped, from
                `Interrupted.finished`; they are not read again.
            expert_tokens: with an expert that is given as states: its tokens, from
                `capture(..., tokens=True)`, so that the maps are fitted on token pairs.

        Raises:
            Interrupted: the user stopped it after some states were read; `.finished` has them, as
                it has in any error that comes after the first reading.
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
        experts = Experts.of(expert)
        if expert_tokens is not None:
            self._check_tokens_are_used()
            experts = experts.with_tokens(expert_tokens, [*pairs.texts, *(texts.anchors or ())])
        target_host.check_ready()
        expert_hooks = experts.check(_or_all("expert_hook_names", expert_hook_names, experts))
        target_hooks = target_host.check_hook_names(
            _or_all("target_hook_names", target_hook_names, target_host)
        )
        rehearse(
            self.config,
            self.seed,
            expert_hook_names=expert_hooks,
            target_hook_names=target_hooks,
            n_anchors=len(texts.fit_texts),
            labels=pairs.labels,
            # Other hook points than the residual may have other widths.
            same_width=bool(expert_hook_names or target_hook_names)
            or experts.are_as_wide_as(target_host),
        )
        reading = reading_of(self.config, *experts.sources.values(), target_host)
        under = read_under(self.config, self.seed, experts, target_host)
        if isinstance(finished, FitData):
            check_finished(
                finished, experts, target_host, texts, reading, expert_hooks, target_hooks, under
            )
        check_lengths(
            experts.hosts,
            target_host,
            texts,
            behaviour=behaviour,
            neutral=None if neutral is None else check_texts("neutral", neutral),
        )
        models = Models(
            experts=experts,
            target=target_host,
            expert_hook_names=expert_hooks,
            target_hook_names=target_hooks,
            reading=reading,
            config=self.config,
            under=under,
            progress=progress,
            readings=TextReader(
                reading=reading,
                batch_size=self.config.batch_size,
                progress=progress,
                finished=finished if isinstance(finished, FinishedReadings) else None,
            ),
        )
        known = finished if isinstance(finished, FitData) else None
        data, gradients = self._read(models, texts, log, known)
        with keeping(data):
            found = solve(
                self.config,
                self.seed,
                target_host,
                data,
                log,
                progress=progress,
                gradients=gradients,
            )
            return collect(self.config, self.seed, target_host, data, found, log)

    def _check_tokens_are_used(self) -> None:
        """Raise `ArgumentError` if these settings fit maps on one state a text anyway."""
        config = self.config
        for name, value, ok in (
            ("pair_tokens", config.pair_tokens, config.pair_tokens),
            ("pairing.rule", config.pairing.rule, takes_gradients(config)),
            (
                "aligner.kind",
                config.aligner.kind,
                isinstance(KINDS[config.aligner.kind], MomentKind),
            ),
        ):
            if not ok:
                raise ArgumentError(
                    f"expert_tokens are not used with config.{name}={value!r}, which fits maps on "
                    "one state a text; change it, or leave expert_tokens out."
                )

    def _read(
        self, models: Models, texts: FitTexts, log: StepLog, known: FitData | None
    ) -> tuple[FitData, dict[str, Tensor] | None]:
        """All states, and the gradients if they were measured: labelled texts and gradients say
        which layers promise something, so that the anchors are read in one pass. What is `known`
        is not read again."""
        config = self.config
        labelled = PairStates.of(known) if known is not None else models.read_pairs(texts)
        log.done(
            "capture",
            pairs=len(texts.pairs),
            expert_layers=len(models.expert_hook_names),
            target_layers=len(models.target_hook_names),
            reading=models.reading,
        )
        gradients = tokens = reason = None
        if takes_gradients(config):
            with models.keeping(known):
                gradients = measure_gradients(
                    config,
                    models.target,
                    list(labelled.target),
                    log,
                    models.progress,
                    behaviour=texts.validation_behaviour,
                    neutral=texts.calibration_texts,
                    readout=labelled.readout,
                )
        if gradients is not None and config.pair_tokens:
            reason = why_not_tokens(models.experts, models.target)
            if reason is None and not isinstance(KINDS[config.aligner.kind], MomentKind):
                reason = f"aligner kind {config.aligner.kind!r} is fitted on rows"
            if reason is None:
                candidates = candidate_pairs(
                    config, models.experts, models.expert_hook_names, labelled.target, gradients
                )
                tokens = TokenPairs(candidates, models.experts, config, self.seed)
        if known is not None and known.maps_on == "tokens" and tokens is None:
            raise ArgumentError(
                "finished holds states of a fit with another config.pair_tokens (or aligner or "
                "rule): its maps are fitted on token pairs; pass the arguments of the fit that was "
                "stopped, or leave finished out."
            )
        with models.keeping(known):
            data = known or models.read_anchors(texts, labelled, tokens)
            if known is not None and tokens is not None:
                data = models.read_tokens_again(known, texts, tokens)
        log.done("anchors", texts=data.n_anchors)
        if tokens is not None and tokens.moments.n < FEWEST_TOKEN_PAIRS:
            reason = f"only {tokens.moments.n} tokens of the anchors end at the same character"
            data = replace(data, expert_token_states=None, target_token_states=None)
        if reason is not None:
            log.done("token pairs", maps_on="one state a text", because=reason)
        elif tokens is not None:
            data = data.with_tokens(tokens.moments, config)
            log.done("token pairs", n=tokens.moments.n, layer_pairs=len(tokens.pairs))
        return data, gradients

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
        tokens: bool = False,
    ) -> ActivationStore:
        """The expert's states that `fit` takes in place of the expert, read as `config.reading`
        says; so that the two models need never be in memory together.

        They hold one state a text. With these alone the maps of a fit are fitted on one state a
        text, too few for wide models; read the tokens too, with `tokens=True`, and give both.

        Args:
            expert: the model that knows.
            pairs: as in `fit`.
            anchors: as in `fit`.
            hook_names: where it is read; default: the residual after every block.
            progress: show progress bars; default: where standard error is a terminal.
            store: a folder that the states are written to as they are read, see `capture`.
            shard: which share of several processes to read, see `capture`.
            tokens: instead of one state a text every token, for `fit(..., expert_tokens=)`: at the
                layers that a fit considers (`config.pairing.n_layers` over the middle half of the
                depth, unless `hook_names` says others); 4 bytes times tokens times layers times
                width.
        """
        host, texts = as_host(expert), [*pairs.texts, *(anchors or ())]
        if tokens:
            names = in_the_middle(host.hook_names(), self.config.pairing.n_layers)
            return capture(
                expert,
                texts,
                names if hook_names is None else hook_names,
                positions="all",
                ends=True,
                batch_size=self.config.batch_size,
                progress=progress,
                store=store,
                shard=shard,
            )
        reading = reading_of(self.config, host)
        return capture(
            expert,
            texts,
            hook_names,
            positions=reading,
            spans=spans_to_read(pairs, anchors) if reading in OF_THE_ANSWER else None,
            batch_size=self.config.batch_size,
            progress=progress,
            store=store,
            shard=shard,
        )


def _or_all(name: str, given: Sequence[str] | None, source: Any) -> list[str]:
    """The hook names given, or those after every block."""
    if given is None:
        return list(source.hook_names())
    if isinstance(given, str):
        raise HookNameError(
            f"{name} must be a list of hook names, got one text; write [{shown(given)}]."
        )
    names = list(given)
    if not names:
        raise ArgumentError(f"{name} is empty; give at least one name, or None for all.")
    return names
