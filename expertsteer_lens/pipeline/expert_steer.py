"""The four steps in order: capture and align, pair layers, learn directions, hand over a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text
from expertsteer_lens.data.contrast import Behaviour, ContrastPairs
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.hosts import as_host

from .config import PRESETS, ExpertSteerConfig, Preset
from .fit_data import divide_texts, read_models
from .fitted import ExpertSteering, collect
from .rehearsal import check_seed, rehearse
from .steps import StepLog, solve

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
            behaviour: prompts with completions. Half is used to choose layers and coefficient, half
                kept for `evaluate`. Without it, layers are chosen by a read-out of the target
                (weaker evidence; see `readout_gradient`).
            test_behaviour: prompts kept for `evaluate`; given, all of `behaviour` is used for
                choices.
            neutral: texts on which steering should change nothing, which measure its damage: every
                other one calibrates the coefficient (from the first on), the rest is kept for
                `evaluate`; given, all anchors are used for fitting. Default: `config.held_out` of
                the anchors.
            expert_hook_names: expert hook points; default: the residual after every block.
            target_hook_names: target hook points; default: the residual after every block.
            progress: show progress bars; default: where standard error is a terminal.
            on_step: called with each finished step's figures.

        Raises:
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
        expert_hooks = list(expert_hook_names or _hooks(source))
        if not isinstance(source, ActivationStore):
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
        data = read_models(
            source,
            target_host,
            texts,
            self.config,
            expert_hook_names=expert_hooks,
            target_hook_names=target_hooks,
            progress=progress,
        )
        log.done(
            "capture",
            pairs=len(pairs),
            anchors=data.target_anchor_states.n,
            expert_layers=len(expert_hooks),
            target_layers=len(target_hooks),
        )
        found = solve(self.config, self.seed, target_host, data, log, progress=progress)
        return collect(self.config, self.seed, target_host, data, found, log)


def _hooks(source: Any) -> list[str]:
    return list(source) if isinstance(source, ActivationStore) else list(source.hook_names())
