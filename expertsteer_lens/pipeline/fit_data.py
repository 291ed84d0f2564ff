"""What a fit reads: the states of both models, and the texts kept apart for calibration and
test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._moved import Renamed
from expertsteer_lens.align import PairedMoments
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import ContrastPairs, text_hash
from expertsteer_lens.data.parts import check_disjoint, groups_of, halves, hashes_of, rows_of
from expertsteer_lens.data.read_positions import ReadPositions
from expertsteer_lens.data.spans import Span, answer_span
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts.token_ends import gives_offsets

if TYPE_CHECKING:
    from .config import ExpertSteerConfig

PairKey = tuple[str, str]
"""(expert hook name, target hook name)"""


LARGEST_SAVED = 2**26
"""Moments of token pairs up to this size (64 MiB) are written to files with the fit."""


@dataclass(frozen=True, eq=False)
class FitData:
    """What a fit reads: states of both models, and the texts kept apart; all that it needs besides
    its settings.

    Rows of the two anchor stores belong together, and rows of the two pair stores; "states" are the
    activations that represent a text, see `ExpertSteerConfig.reading`."""

    expert_anchor_states: ActivationStore
    """The expert's states on the anchors."""
    target_anchor_states: ActivationStore
    """The target's states on the same anchors."""
    expert_pair_states: ActivationStore
    """The expert's states on the texts of the contrast pairs, labelled."""
    target_pair_states: ActivationStore
    """The target's own states on the texts of the contrast pairs, labelled: the native ceiling is
    learnt from these."""
    readout: Float[Tensor, " d_target"]
    """The target's own mean difference at its last layer: the metric where no completions are
    given."""
    calibration_texts: tuple[Text, ...]
    """Neutral texts on which coefficients are calibrated."""
    test_texts: tuple[Text, ...]
    """Neutral texts that only `evaluate` reads."""
    validation_behaviour: Behaviour | None
    """Prompts used for choices."""
    test_behaviour: Behaviour | None
    """Prompts that only `evaluate` reads."""
    provenance: dict[str, Any]
    """Names, fingerprints and hashes of what went in."""
    text_hashes: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """Digests of every text of "pairs" and "anchors" that was fitted on, in the order of the rows,
    by which `evaluate` knows them; empty in what an earlier version saved."""
    maps_on: Literal["texts", "tokens"] = "texts"
    """Whether the maps were fitted on one state a text or on token pairs."""
    token_moments: PairedMoments | None = field(default=None, repr=False)
    """Moments of the token pairs of the candidate layer pairs; None in what was read from a file
    if they are larger than `LARGEST_SAVED`."""
    expert_token_states: ActivationStore | None = field(default=None, repr=False)
    """The expert's states on a sample of the token pairs, on which layers are compared, with the
    text of each row in `provenance["groups"]`; None where there are none, and in what was read from
    a file if they were larger than `LARGEST_SAVED`."""
    target_token_states: ActivationStore | None = field(default=None, repr=False)
    """The target's, row by row of the same words."""

    def with_tokens(self, moments: PairedMoments, config: ExpertSteerConfig) -> FitData:
        """The same with moments of token pairs, on which the maps are then fitted.

        Args:
            moments: of the token pairs.
            config: the settings under which these were chosen and read.
        """
        sample = self.expert_token_states
        facts = {
            "n": moments.n,
            "compared": 0 if sample is None else sample.n,
            **_token_settings(config),
        }
        return replace(
            self,
            maps_on="tokens",
            token_moments=moments,
            provenance={**self.provenance, "token_pairs": facts},
        )

    def check_tokens_serve(self, config: ExpertSteerConfig) -> None:
        """Raise `ArgumentError` if these settings would have had other token pairs read."""
        read = self.provenance.get("token_pairs", {})
        for name, value in _token_settings(config).items() if self.maps_on == "tokens" else ():
            if read.get(name, value) != value:
                raise ArgumentError(
                    f"{name}={value!r} acts only where token pairs are read, and refit reads none "
                    f"(they were read under {read[name]!r}); run ExpertSteer(...).fit again, or "
                    "leave it as it was."
                )

    @property
    def n_compared(self) -> int:
        """Token pairs that layers were compared on; 0 where it was one state a text."""
        return int(self.provenance.get("token_pairs", {}).get("compared", 0))

    @property
    def n_anchors(self) -> int:
        """Unlabelled texts that were read."""
        return self.target_anchor_states.n

    @property
    def pair_groups(self) -> list[int] | None:
        """The group of each row of the pair states, equal for equal texts; None if unknown."""
        keys, number = self.text_hashes.get("pairs"), dict[str, int]()
        return None if keys is None else [number.setdefault(k, len(number)) for k in keys]

    def __repr__(self) -> str:
        return (
            f"FitData({self.target_pair_states.n} labelled texts, {self.target_anchor_states.n} "
            f"anchors; maps on {self.maps_on})"
        )

    def to_fields(self) -> dict[str, Any]:
        """What a file holds of it."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.token_moments is not None and self.token_moments.n_bytes > LARGEST_SAVED:
            content["token_moments"] = None
        stores = [s for s in (self.expert_token_states, self.target_token_states) if s is not None]
        if sum(4 * s.n * s[name].shape[1] for s in stores for name in s) > LARGEST_SAVED:
            content |= {"expert_token_states": None, "target_token_states": None}
        return content

    def states_to_compare(
        self, config: ExpertSteerConfig
    ) -> tuple[ActivationStore, ActivationStore, list[int] | None]:
        """The states of expert and target that layers are compared on, and the group of each row
        (None: every row is a text).

        Raises:
            ArgumentError: they were token pairs, which were too large to be saved with the fit.
        """
        expert, target = self.expert_token_states, self.target_token_states
        if config.mi_on == "tokens" and expert is not None and target is not None:
            return expert, target, list(expert.provenance["groups"])
        if config.mi_on == "tokens" and self.n_compared:
            raise ArgumentError(
                "the layers of this fit were compared on token pairs, whose states were too large "
                "to be saved with it; pass mi_on='texts', or run ExpertSteer(...).fit again."
            )
        return self.expert_anchor_states, self.target_anchor_states, None

    # Names of version 0.1.
    expert_anchors = Renamed("expert_anchor_states")
    target_anchors = Renamed("target_anchor_states")
    expert_pairs = Renamed("expert_pair_states")
    target_pairs = Renamed("target_pair_states")


def _token_settings(config: ExpertSteerConfig) -> dict[str, Any]:
    """The settings that decide which token pairs are read."""
    pairing = config.pairing
    return {
        "align_on_pairs": config.align_on_pairs,
        "pairing.n_layers": pairing.n_layers,
        "pairing.skip_first": pairing.skip_first,
        "pairing.skip_last": pairing.skip_last,
    }


def labels_of(store: ActivationStore) -> Tensor:
    """Labels of a store that has some: 1 = positive, 0 = negative."""
    assert store.labels is not None
    return store.labels


@dataclass(frozen=True, eq=False, kw_only=True)
class FitTexts:
    """The texts of one fit, divided before any model is run."""

    pairs: ContrastPairs
    anchors: list[Text] | None
    """All anchors in the order given; None where the texts of the pairs stand in for them."""
    fit_texts: list[Text]
    """Those the maps are fitted on."""
    fit_spans: list[Span] | None
    """The answers' spans of these, where they are texts of the pairs: both models are read on the
    same words, whether here or before (`ExpertSteer.capture`). None: each text's own."""
    calibration_texts: list[Text]
    test_texts: list[Text]
    validation_behaviour: Behaviour | None
    test_behaviour: Behaviour | None
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers and hashes of texts, for the provenance."""


def divide_texts(
    pairs: ContrastPairs,
    config: ExpertSteerConfig,
    seed: int,
    *,
    anchors: Sequence[Text] | None,
    behaviour: Behaviour | None,
    test_behaviour: Behaviour | None,
    neutral: Sequence[Text] | None,
) -> FitTexts:
    """Which texts are for fitting, calibration and test; the arguments are those of
    `ExpertSteer.fit`.

    Raises:
        ArgumentError: `test_behaviour` without `behaviour`.
        DataError: pairs of another type, too few texts to divide, `test_behaviour` with prompts of
            `behaviour`, or `neutral` with texts of the anchors or pairs.
    """
    if not isinstance(pairs, ContrastPairs):
        raise DataError(
            f"pairs must be ContrastPairs, got {type(pairs).__name__}; use "
            "ContrastPairs.from_lists(...)."
        )
    if len(pairs) < 2:
        raise DataError(
            f"pairs must hold at least 2 pairs, to learn a direction and check it, got "
            f"{len(pairs)}; give more, or have a model label unlabelled texts with what you have "
            "(label_texts)."
        )
    if test_behaviour is not None and behaviour is None:
        raise ArgumentError(
            "test_behaviour is given without behaviour, the prompts to choose layers by; pass both."
        )
    texts = pairs.texts if anchors is None else check_texts("anchors", anchors)
    if neutral is None:
        fitted = [] if anchors is None else pairs.texts
        fit_texts, calibration_texts, test_texts = split_anchors(
            texts, config.held_out, seed, fitted=fitted
        )
    else:
        fit_texts, kept = texts, check_texts("neutral", neutral)
        calibration_texts, test_texts = halves(kept)
        if not test_texts:
            raise DataError(
                "neutral holds 1 text (equal ones count once), but one half calibrates and the "
                "other tests; give more."
            )
        others = {"the texts of pairs": pairs.texts, "anchors": [] if anchors is None else texts}
        for name, those in others.items():
            remedy = f"leave these out of neutral or of {name}"
            check_disjoint("neutral", kept, name, those, remedy=remedy)
    validation, test = behaviour, test_behaviour
    if behaviour is not None and test_behaviour is not None:
        check_disjoint(
            "test_behaviour",
            test_behaviour.prompts,
            "behaviour",
            behaviour.prompts,
            remedy="give other prompts, or leave test_behaviour out, and behaviour is divided",
        )
    if behaviour is not None and test_behaviour is None:
        validation, test = behaviour.split(config.validation, seed=seed)
    return FitTexts(
        pairs=pairs,
        anchors=None if anchors is None else list(texts),
        fit_texts=list(fit_texts),
        fit_spans=None if anchors is not None else _spans_of(fit_texts, pairs),
        calibration_texts=list(calibration_texts),
        test_texts=list(test_texts),
        validation_behaviour=validation,
        test_behaviour=test,
        facts={
            "pairs": {"n": len(pairs), "hash": pairs.hash},
            "anchors": {"n": len(texts), "hash": text_hash(texts), "given": anchors is not None},
            "behaviour": None
            if behaviour is None
            else {"n": len(behaviour), "hash": behaviour.hash},
            "test_behaviour": None if test is None else {"n": len(test), "hash": test.hash},
            "neutral": None if neutral is None else {"n": len(kept), "hash": text_hash(kept)},
        },
    )


def _spans_of(texts: Sequence[Text], pairs: ContrastPairs) -> list[Span]:
    """The answer of each of these texts of the pairs; of a text that comes twice the first."""
    known = dict(reversed(list(zip(pairs.texts, pairs.answer_spans, strict=True))))
    return [known[text] for text in texts]


def reading_of(config: ExpertSteerConfig, *models: Any) -> ReadPositions:
    """What state represents a text in all of these models: `config.reading`, but "mean" in place of
    "answer" where a tokenizer does not say which characters its tokens cover."""
    tokenizers = [m.tokenizer for m in models if not isinstance(m, ActivationStore)]
    if config.reading == "answer" and not all(gives_offsets(t) for t in tokenizers):
        return "mean"
    return config.reading


def spans_to_read(pairs: ContrastPairs, anchors: Sequence[Text] | None) -> list[Span]:
    """The answers' spans of `[*pairs.texts, *anchors]`."""
    return [*pairs.answer_spans, *(answer_span(text) for text in anchors or ())]


def split_anchors(
    texts: Sequence[Text], held_out: float, seed: int, *, fitted: Sequence[Text] = ()
) -> tuple[list[Text], list[Text], list[Text]]:
    """(fit, calibration, test) parts that share no text; `held_out` of the distinct texts is split
    evenly between the last two.

    Args:
        texts: what to divide.
        held_out: share of the distinct texts.
        seed: of the division.
        fitted: texts that are fitted on anyway; those among `texts` are not held out.

    Raises:
        DataError: too few texts for three parts.
    """
    groups = groups_of(texts)
    n, taken = max(groups) + 1, set(hashes_of(fitted))
    keys = dict(zip(groups, hashes_of(texts), strict=True))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    # Stable: without such texts the order is the drawn one.
    order.sort(key=lambda group: keys[group] in taken)
    free = sum(key not in taken for key in keys.values())
    kept = max(1, round(n * held_out / 2))
    if n - 2 * kept < 2 or free < 2 * kept:
        also = "" if free == n else f" ({n - free} are texts of pairs, which are fitted on)"
        raise DataError(
            f"anchors: {n} distinct texts{also} are too few to fit on and hold out "
            f"{held_out:.0%}; give more anchors."
        )
    parts = order[2 * kept :], order[:kept], order[kept : 2 * kept]
    fit, calibration, test = ([texts[i] for i in rows_of(groups, part)] for part in parts)
    return fit, calibration, test
