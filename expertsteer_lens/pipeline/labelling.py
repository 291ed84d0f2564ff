"""Labels for unlabelled texts, from a model that understands a few labelled ones, an instruction or
a question.

A model that knows what is meant can label texts for one that does not: with one or a few labelled
pairs, or told or asked in plain words and without any, the expert labels unlabelled texts, and the
target's own direction is then learnt from those:
`ExpertSteer().fit(target, target, labelled.pairs(), ...)`. No map between the two models is
needed. The target as its own labeller is the control that says what the expert adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from expertsteer_lens._checks import check_classes, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import ContrastPairs
from expertsteer_lens.data.read_positions import OF_THE_ANSWER
from expertsteer_lens.data.spans import Span, answer_span
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host, capture

from .asking import ANSWERS, ask_about
from .config import ExpertSteerConfig
from .fit_data import reading_of
from .instructed import likelier_under

if TYPE_CHECKING:
    import pandas

SOFTNESS = 1.5
"""A text one standard deviation from the middle has the weight tanh(1.5) = 0.91."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledTexts:
    """Unlabelled texts with the scores that a model gave them; see `label_texts`."""

    texts: tuple[Text, ...]
    scores: Float[Tensor, " n"]
    """One per text, standardised to mean 0 and variance 1; larger is more positive."""
    threshold: float
    """Scores above it are labelled positive: the cut that leaves least variance on its two sides.
    The classes need not be equally large."""
    spans: tuple[Span, ...]
    """The part of each text that was read, in characters of its content."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Model, settings and hashes of what went in."""

    @property
    def labels(self) -> Int64[Tensor, " n"]:
        """1 = positive, 0 = negative."""
        return (self.scores > self.threshold).long()

    def pairs(self, n: int | None = None) -> ContrastPairs:
        """The texts of clearest label as contrast pairs: the most positive with the most negative,
        the next with the next, and so on.

        Args:
            n: number of pairs; default: as many as the smaller class has texts.

        Raises:
            ArgumentError: more pairs than the smaller class has texts.
        """
        order = torch.argsort(self.scores, descending=True, stable=True).tolist()
        positive = int(self.labels.sum())
        most = min(positive, len(order) - positive)
        n = most if n is None else n
        check_number("n", n, low=1, high=most, integer=True)
        return ContrastPairs.from_lists(
            [self.texts[i] for i in order[:n]], [self.texts[i] for i in order[::-1][:n]]
        )

    def agreement(self, labels: Any) -> float:
        """Share of texts, in [0, 1], on which these labels agree with known ones.

        Args:
            labels: one per text, 1 = positive; bool, 0/1 or -1/+1.

        Raises:
            DataError: another number of labels than of texts, NaN, or labels of another kind.
        """
        known = check_classes("labels", labels, len(self.texts)) > 0
        return float((known == (self.labels > 0)).float().mean())

    def to_pandas(self) -> pandas.DataFrame:
        """One row per text, in the order given: text, score, label."""
        import pandas as pd

        return pd.DataFrame(
            {
                "text": [str(t) for t in self.texts],
                "score": self.scores.tolist(),
                "label": self.labels.tolist(),
            }
        )

    _repr_html_ = repr_html

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        positive = int(self.labels.sum())
        name = self.provenance.get("model", {}).get("name", "?")
        return f"LabelledTexts({len(self)} texts by {name}: {positive} positive)"


def label_texts(
    model: Any,
    pairs: ContrastPairs | None,
    texts: Sequence[Text],
    *,
    instruction: str | None = None,
    against: str | None = None,
    question: str | None = None,
    answers: tuple[str, str] = ANSWERS,
    hook_names: Sequence[str] | None = None,
    n_rounds: int | None = None,
    flatten: int | None = None,
    config: ExpertSteerConfig | None = None,
    progress: bool | None = None,
) -> LabelledTexts:
    """Label texts with a model that has seen a few labelled pairs, is told what is wanted, or is
    asked a question.

    From pairs: at every layer the mean difference of the labelled pairs projects the texts; the sum
    over layers of the standardised projections is the score. Then, in each round, the scores become
    soft labels, the mean difference is taken anew from all texts under these, and projects again
    (self-training): what the texts themselves divide into is found, and the labelled pairs decide
    only which side is which and which division is meant. Both groups are centred by their own mean,
    so the labelled pairs may be of another kind than the texts: another style, another language.

    From an instruction: how much likelier the instruction makes each text, per token, is the score
    that self-training starts from, and no labelled text is needed. Nothing is asked of the model
    but to read, so it may be a small one, or the target itself.

    From a question: how much rather the model answers "Yes" than "No" when it is asked about a
    text, in the same place. It takes a model that understands the question: see `.scores` of a few
    texts you know. Standardised scores of an instruction and of a question add up, and so do those
    and the score of pairs.

    Args:
        model: the labeller; any host object.
        pairs: labelled, at least one; None where an instruction or a question is all there is.
        texts: to be labelled, at least 4, of both classes; the more the better.
        instruction: what one would write to get the positive texts, as "You are an expert in
            chess."; see `likelier_under`.
        against: what one would write to get the others; default: nothing.
        question: asked of every text, as "Is this text about chess?"; see `ask_about`.
        answers: the answer of positive texts and that of negative ones.
        hook_names: where the model is read; default: the residual after every block but the first
            and the last.
        n_rounds: of self-training, >= 0; default 4, and 1 where there is a question, whose scores
            have less to gain from it.
        flatten: how many leading principal axes of the texts are shrunk to the variance of the
            last of them, >= 1; 1 shrinks none. Default 1, and 6 where there is an instruction or a
            question. Where something else than what is meant divides the texts most (topic,
            length), self-training drifts to it; 3 to 8 prevent that. Where texts and pairs are of
            different kinds, leave it at 1.
        config: `reading` and `batch_size` are used; default: those of `ExpertSteerConfig()`.
        progress: show progress bars; default: where standard error is a terminal.

    Returns:
        The texts with scores and labels; `.pairs()` are contrast pairs for `ExpertSteer.fit`.

    Raises:
        DataError: pairs of another type, fewer than 4 texts, or texts whose states are all alike.
        ArgumentError: a setting out of range, neither pairs nor instruction nor question, or
            `against` without an instruction.
        HookNameError: a hook name that the model lacks.

    Example:
        >>> from expertsteer_lens import zoo
        >>> expert, _ = zoo.load_pair()
        >>> pairs = zoo.contrast_pairs()
        >>> one = ContrastPairs.from_lists(pairs.positive[:1], pairs.negative[:1])
        >>> labelled = label_texts(expert, one, pairs.texts)
        >>> labelled.agreement(pairs.labels) > 0.9
        True

        Without a labelled text:
        `label_texts(expert, None, texts, instruction="You are an expert in chess.")`.
    """
    n_rounds = (4 if question is None else 1) if n_rounds is None else n_rounds
    without_pairs = instruction is not None or question is not None
    flatten = (6 if without_pairs else 1) if flatten is None else flatten
    check_number("n_rounds", n_rounds, low=0, integer=True)
    check_number("flatten", flatten, low=1, integer=True)
    config = ExpertSteerConfig() if config is None else config
    if not isinstance(config, ExpertSteerConfig):
        raise ArgumentError(
            f"config must be an ExpertSteerConfig, got {config!r}; ExpertSteerConfig.from_dict "
            "makes one of a dict."
        )
    if pairs is None and not without_pairs:
        raise ArgumentError(
            "give pairs, an instruction or a question; nothing says what is positive."
        )
    if against is not None and instruction is None:
        raise ArgumentError("against= goes with instruction=, which says what is positive.")
    if pairs is not None and not isinstance(pairs, ContrastPairs):
        raise DataError(
            f"pairs must be ContrastPairs, got {type(pairs).__name__}; use "
            "ContrastPairs.from_lists(...)."
        )
    given = check_texts("texts", texts)
    if len(given) < 4:
        raise DataError(f"texts holds {len(given)} texts; give at least 4, of both classes.")
    host = as_host(model)
    names = list(hook_names) if hook_names is not None else (host.hook_names()[1:-1] or None)
    reading = reading_of(config, host)
    spans = [answer_span(text) for text in given]

    def read(of: Sequence[Text], where: Sequence[Span]) -> ActivationStore:
        return capture(
            model,
            of,
            names,
            positions=reading,
            spans=where if reading in OF_THE_ANSWER else None,
            batch_size=config.batch_size,
            progress=progress,
        )

    # Before the states are read: what is said may be refused.
    first: list[Tensor] = []
    if instruction is not None:
        first.append(
            likelier_under(
                model,
                instruction,
                given,
                against=against,
                spans=spans,
                batch_size=config.batch_size,
                progress=progress,
            )
        )
    if question is not None:
        first.append(
            ask_about(
                model,
                question,
                given,
                answers=answers,
                spans=spans,
                batch_size=config.batch_size,
                progress=progress,
            )
        )
    labelled = None if pairs is None else read(pairs.texts, pairs.answer_spans)
    unlabelled = read(given, spans)
    scores = score_states(
        None if labelled is None else [labelled[name] for name in labelled],
        None if pairs is None else pairs.labels,
        [unlabelled[name] for name in unlabelled],
        n_rounds=n_rounds,
        flatten=flatten,
        start=torch.stack([_standard(x.double()) for x in first]).sum(0) if first else None,
    )
    return LabelledTexts(
        texts=tuple(given),
        scores=scores,
        threshold=best_cut(scores),
        spans=tuple(spans),
        provenance={
            "model": host.facts(),
            "pairs": None if pairs is None else {"n": len(pairs), "hash": pairs.hash},
            "instruction": instruction,
            "against": against,
            "question": question,
            "answers": list(answers) if question is not None else None,
            "n_rounds": n_rounds,
            "flatten": flatten,
            "reading": reading,
        },
    )


def score_states(
    labelled: Sequence[Float[Tensor, "m d"]] | None,
    labels: Float[Tensor, " m"] | None,
    unlabelled: Sequence[Float[Tensor, "n d"]],
    *,
    n_rounds: int = 4,
    flatten: int = 1,
    start: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """The scores of `label_texts` from states.

    Args:
        labelled: states of the labelled texts, one matrix a layer; None: there are none.
        labels: 1 = positive; None as well then.
        unlabelled: states of the texts to be labelled, at the same layers.
        n_rounds: of self-training.
        flatten: leading principal axes that are shrunk.
        start: further scores of the unlabelled texts, to start from.

    Raises:
        DataError: states that are all alike at every layer.
    """
    layers = []
    total = torch.zeros(len(unlabelled[0]), dtype=torch.float64)
    for i, many in enumerate(unlabelled):
        rows = many.double() - many.double().mean(0)
        size = rows.norm(dim=1).mean()
        if not bool(size > 0):
            continue
        direction = torch.zeros_like(rows[0])
        if labelled is not None and labels is not None:
            direction = _difference(labelled[i], labels)
        if flatten > 1:
            rows, direction = flatten_axes(rows, direction, flatten)
        rows = rows / size
        layers.append(rows)
        total += _standard(rows @ direction)
    if not layers:
        raise DataError("texts have the same state at every layer; nothing divides them.")
    if start is not None:
        total = _standard(total) + _standard(start.double())
    for _ in range(n_rounds):
        soft = torch.tanh(SOFTNESS * _standard(total))
        soft = soft - soft.mean()
        total = torch.stack([_standard(rows @ (soft @ rows)) for rows in layers]).sum(0)
    return _standard(total).float()


def _difference(few: Tensor, labels: Tensor) -> Tensor:
    """Mean of the positive rows minus that of the others, of any length."""
    signs = labels.double() * 2 - 1
    weights = signs / torch.where(signs > 0, (signs > 0).sum(), (signs < 0).sum())
    difference: Tensor = weights @ few.double()
    return difference


def best_cut(scores: Float[Tensor, " n"]) -> float:
    """The threshold that leaves least variance within the two sides (the best 2-means of one
    dimension), halfway between its neighbours."""
    ordered = scores.double().sort().values
    n = len(ordered)
    left = torch.arange(1, n, dtype=torch.float64)
    sums = ordered.cumsum(0)
    low, high = sums[:-1] / left, (sums[-1] - sums[:-1]) / (n - left)
    between = left * (n - left) * (high - low) ** 2
    i = int(between.argmax())
    return float((ordered[i] + ordered[i + 1]) / 2)


def _standard(values: Tensor) -> Tensor:
    """Mean 0, variance 1; zeros where all are alike."""
    centred = values - values.mean()
    return centred / centred.std(correction=0).clamp(min=torch.finfo(values.dtype).tiny)


def flatten_axes(rows: Tensor, direction: Tensor, n_axes: int) -> tuple[Tensor, Tensor]:
    """Rows and direction with the leading principal axes shrunk to the size of the last of them."""
    _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
    n_axes = min(n_axes, int((sizes > sizes[0] * 1e-9).sum()))
    axes, shrink = axes[:n_axes], sizes[n_axes - 1] / sizes[:n_axes] - 1

    def shrunk(x: Tensor) -> Tensor:
        along: Tensor = (x @ axes.T * shrink) @ axes
        return x + along

    return shrunk(rows), shrunk(direction)
