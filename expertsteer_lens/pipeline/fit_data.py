"""What a fit reads: the states of both models, and the texts kept apart for calibration and
test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import Behaviour, ContrastPairs, text_hash
from expertsteer_lens.data.texts import are_states_of
from expertsteer_lens.errors import DataError
from expertsteer_lens.hosts import capture
from expertsteer_lens.learn.directions import mean_difference

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host

    from .expert_steer import ExpertSteerConfig

PairKey = tuple[str, str]
"""(expert hook name, target hook name)"""


@dataclass(frozen=True, eq=False)
class Readings:
    """What was read from the two models, and the texts kept apart: all that a fit needs besides its
    settings."""

    expert_anchors: ActivationStore
    """The expert's states on the anchors."""
    target_anchors: ActivationStore
    """The target's states on the same anchors."""
    expert_pairs: ActivationStore
    """The expert's states on the contrast pairs, labelled."""
    target_pairs: ActivationStore
    """The target's own states on the contrast pairs, labelled: the native ceiling is learnt from
    these."""
    readout: Float[Tensor, " d_target"]
    """The target's own mean difference at its last layer: the metric where no completions are
    given."""
    calibration_texts: tuple[Text, ...]
    test_texts: tuple[Text, ...]
    validation_behaviour: Behaviour | None
    test_behaviour: Behaviour | None
    provenance: dict[str, Any]


def read_models(
    expert: Host | ActivationStore,
    target: Host,
    pairs: ContrastPairs,
    config: ExpertSteerConfig,
    seed: int,
    *,
    anchors: Sequence[Text] | None,
    behaviour: Behaviour | None,
    test_behaviour: Behaviour | None,
    neutral: Sequence[Text] | None,
    expert_hook_names: Sequence[str] | None,
    target_hook_names: Sequence[str] | None,
    progress: bool,
) -> Readings:
    """Divide the texts and read them; the arguments are those of `ExpertSteer.fit`."""
    if not isinstance(pairs, ContrastPairs):
        raise DataError(
            f"pairs must be ContrastPairs, got {type(pairs).__name__}; use "
            "ContrastPairs.from_lists(...)."
        )
    if isinstance(expert, ActivationStore):
        expert_hooks = list(expert_hook_names or expert)
    else:
        expert_hooks = expert.check_hook_names(list(expert_hook_names or expert.hook_names()))
    target_hooks = target.check_hook_names(list(target_hook_names or target.hook_names()))
    texts = pairs.texts if anchors is None else check_texts("anchors", anchors)
    if neutral is None:
        fit_texts, calibration_texts, test_texts = split_anchors(texts, config.held_out, seed)
    else:
        fit_texts, kept = texts, check_texts("neutral", neutral)
        if len(kept) < 2:
            raise DataError(
                "neutral holds 1 text, but one half calibrates and the other tests; give more."
            )
        calibration_texts, test_texts = kept[::2], kept[1::2]
    validation, test = behaviour, test_behaviour
    if behaviour is not None and test_behaviour is None:
        validation, test = behaviour.split(config.validation, seed=seed)

    how: dict[str, Any] = {
        "positions": config.read_positions,
        "batch_size": config.batch_size,
        "progress": progress,
    }
    if isinstance(expert, ActivationStore):
        expert_anchors, expert_pairs = _from_states(
            expert,
            expert_hooks,
            pairs,
            None if anchors is None else texts,
            fit_texts,
            config.read_positions,
        )
    else:
        expert_anchors = capture(expert.model, fit_texts, expert_hooks, **how)
        expert_pairs = capture(expert.model, pairs.texts, expert_hooks, labels=pairs.labels, **how)
    target_anchors = capture(target.model, fit_texts, target_hooks, **how)
    target_pairs = capture(target.model, pairs.texts, target_hooks, labels=pairs.labels, **how)
    final = target.hook_names()[-1]
    store = (
        target_pairs
        if final in target_pairs
        else capture(target.model, pairs.texts, [final], **how)
    )
    provenance = {
        "expert": _model_facts(expert_pairs),
        "target": _model_facts(target_pairs),
        "pairs": {"n": len(pairs), "hash": pairs.hash},
        "anchors": {"n": len(texts), "hash": text_hash(texts), "given": anchors is not None},
        "behaviour": None if behaviour is None else {"n": len(behaviour), "hash": behaviour.hash},
        "neutral": None if neutral is None else {"n": len(neutral), "hash": text_hash(kept)},
    }
    return Readings(
        expert_anchors=expert_anchors,
        target_anchors=target_anchors,
        expert_pairs=expert_pairs,
        target_pairs=target_pairs,
        readout=mean_difference(store[final], pairs.labels),
        calibration_texts=tuple(calibration_texts),
        test_texts=tuple(test_texts),
        validation_behaviour=validation,
        test_behaviour=test,
        provenance=provenance,
    )


def split_anchors(
    texts: Sequence[Text], held_out: float, seed: int
) -> tuple[list[Text], list[Text], list[Text]]:
    """Disjoint (fit, calibration, test) parts; `held_out` is split evenly between the last two.

    Raises:
        DataError: too few texts for three parts.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = max(1, round(len(texts) * held_out / 2))
    if len(texts) - 2 * kept < 2:
        raise DataError(
            f"anchors: {len(texts)} texts are too few to fit on and hold out {held_out:.0%}; give "
            "more anchors."
        )
    parts = order[2 * kept :], order[:kept], order[kept : 2 * kept]
    fit, calibration, test = ([texts[i] for i in part] for part in parts)
    return fit, calibration, test


def _model_facts(store: ActivationStore) -> dict[str, Any]:
    names = ("name", "fingerprint", "d_model", "n_layers", "basis", "prepend_bos")
    return {name: store.provenance.get(name) for name in names}


def _from_states(
    states: ActivationStore,
    names: Sequence[str],
    pairs: ContrastPairs,
    anchors: Sequence[Text] | None,
    fit_texts: Sequence[Text],
    positions: str | int,
) -> tuple[ActivationStore, ActivationStore]:
    """The anchors' and the pairs' rows of states captured before.

    Raises:
        DataError: they are of other texts, or of another token of each.
    """
    texts = [*pairs.texts, *(anchors or ())]
    wanted = (
        "capture(expert, [*pairs.texts, *anchors])"
        if anchors is not None
        else "capture(expert, pairs.texts)"
    )
    facts = states.provenance
    if states.n != len(texts) or not are_states_of(facts, texts):
        raise DataError(
            f"expert holds states of {states.n} texts, which are not the {len(texts)} of pairs and "
            "anchors, in this order; "
            f"make them with {wanted}."
        )
    if facts.get("positions", positions) != positions:
        raise DataError(
            f"expert holds states read at positions={facts['positions']!r}, but "
            f"config.read_positions is {positions!r}; "
            "read and fit at the same token."
        )
    row = {
        text: i for i, text in reversed(list(enumerate(texts)))
    }  # a text that comes twice has the same state twice
    chosen = ActivationStore({name: states[name] for name in names}, provenance=facts)
    fitted = chosen.select([row[text] for text in fit_texts])
    return fitted, ActivationStore(chosen.select(range(len(pairs.texts))), pairs.labels, facts)
