"""Reading both models for a fit: the labelled texts first, then, knowing which layers promise
something, the anchors, in one pass of each model."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.parts import groups_of, hashes_of
from expertsteer_lens.data.read_positions import OF_THE_ANSWER, ReadPositions
from expertsteer_lens.data.spans import Span
from expertsteer_lens.data.texts import are_states_of
from expertsteer_lens.errors import DataError
from expertsteer_lens.hosts.side_by_side import TokenSample, capture_side_by_side
from expertsteer_lens.learn.directions import mean_difference

from .config import ExpertSteerConfig
from .experts import Experts, model_facts
from .finished import keeping
from .fit_data import FitData, FitTexts, spans_to_read
from .readings import TextReader
from .token_pairs import TokenPairs

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


COMPARED = 1024
"""Token pairs that layers are compared on, about. Chosen by us: enough for the order of the layer
pairs to be the same on other texts (`benchmarks/layer_pair_reliability.py`), and no larger than
the states of a thousand anchors."""
EXPERT, TARGET = "expert on pairs", "target on pairs"
EXPERT_ANCHORS, TARGET_ANCHORS = "expert on anchors", "target on anchors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Models:
    """What a fit reads, where and how.

    Args:
        experts: the expert, or several; each a model, or its states captured before.
        target: the model to be steered.
        expert_hook_names: where the expert is read, checked.
        target_hook_names: where the target is read, checked.
        reading: what state represents a text, see `reading_of`.
        config: in what batches.
        under: kept with what is read, see `read_under`.
        progress: show progress bars; None: where standard error is a terminal.
        readings: reads, and knows what was read by a fit that was stopped.
    """

    experts: Experts
    target: Host
    expert_hook_names: list[str]
    target_hook_names: list[str]
    reading: ReadPositions
    config: ExpertSteerConfig
    under: dict[str, Any]
    progress: bool | None
    readings: TextReader

    def read_pairs(self, texts: FitTexts) -> PairStates:
        """The states of both models on the labelled texts."""
        expert = self.experts.joined(
            [
                _rows_of_states(source, names, texts, self.reading)[1]
                if isinstance(source, ActivationStore)
                else self._labelled(_of(EXPERT, label), source, texts, names)
                for label, source, names in self._each_expert()
            ]
        )
        target = self._labelled(TARGET, self.target, texts, self.target_hook_names)
        final = self.target.hook_names()[-1]
        ends = target
        if final not in target:
            ends = self._labelled(f"{TARGET} (last layer)", self.target, texts, [final])
        return PairStates(expert, target, mean_difference(ends[final], texts.pairs.labels))

    def read_anchors(
        self, texts: FitTexts, labelled: PairStates, tokens: TokenPairs | None
    ) -> FitData:
        """The states of both models on the anchors, and all that is read.

        Args:
            texts: see `divide_texts`.
            labelled: read before.
            tokens: takes the pairs of tokens of the unlabelled texts, from the same passes.
        """
        target = self.target
        compared: tuple[ActivationStore | None, ActivationStore | None] = (None, None)
        if tokens is not None:
            sample = self._sample(texts)
            anchors = self._with_tokens(texts, tokens, sample)
            if self.experts.tokens is not None:
                anchors = [*self._stored_anchors(texts), *anchors]
            compared = self._compared_states(sample, texts, anchors)
        else:
            anchors = [
                _rows_of_states(source, names, texts, self.reading)[0]
                if isinstance(source, ActivationStore)
                else self._unlabelled(_of(EXPERT_ANCHORS, label), source, texts, names)
                for label, source, names in self._each_expert()
            ]
            anchors.append(self._unlabelled(TARGET_ANCHORS, target, texts, self.target_hook_names))
        expert_anchors, target_anchors = self.experts.joined(anchors[:-1]), anchors[-1]
        return FitData(
            expert_anchor_states=expert_anchors,
            target_anchor_states=target_anchors,
            expert_pair_states=labelled.expert,
            target_pair_states=labelled.target,
            expert_token_states=compared[0],
            target_token_states=compared[1],
            readout=labelled.readout,
            calibration_texts=tuple(texts.calibration_texts),
            test_texts=tuple(texts.test_texts),
            validation_behaviour=texts.validation_behaviour,
            test_behaviour=texts.test_behaviour,
            provenance={
                "expert": model_facts(labelled.expert),
                "target": model_facts(labelled.target),
                "reading": self.reading,
                "read_under": self.under,
                "made_on": made_on(target),
                **texts.facts,
            },
            text_hashes={
                "pairs": hashes_of(texts.pairs.texts),
                "anchors": hashes_of(texts.fit_texts),
            },
        )

    def read_tokens_again(self, known: FitData, texts: FitTexts, tokens: TokenPairs) -> FitData:
        """The pairs of tokens of a fit that was stopped: as they were kept, or read anew where
        they were too large for its file; and its data with the sample of them."""
        if not self.experts.gives_tokens:
            return known
        if known.token_moments is not None:
            known.check_tokens_serve(self.config)
            tokens.take_over(known.token_moments)
        is_lost = known.expert_token_states is None and known.n_compared > 0
        sample = self._sample(texts) if is_lost else None
        if known.token_moments is None:
            stores = self._with_tokens(texts, tokens, sample)
        elif sample is not None:
            again = TokenPairs(tokens.pairs, self.experts, self.config, tokens.seed)
            stores = self._with_tokens(texts, again, sample, pairs_too=False)
        if sample is None:
            return known
        expert, target = self._compared_states(sample, texts, stores)
        return replace(known, expert_token_states=expert, target_token_states=target)

    @contextmanager
    def keeping(self, known: FitData | None) -> Iterator[None]:
        """A block in which what was read is not lost if the user stops it.

        Raises:
            Interrupted: the user did, and something was read.
        """
        with keeping(known) if known is not None else self.readings.keeping():
            yield

    def _with_tokens(
        self,
        texts: FitTexts,
        tokens: TokenPairs,
        sample: TokenSample | None,
        *,
        pairs_too: bool = True,
    ) -> list[ActivationStore]:
        """The anchors' states of each expert and, last, of the target, in the same passes their
        pairs of tokens; and, where they enter the maps, the pairs of tokens of the labelled texts,
        without their labels."""
        states = capture_side_by_side(
            [*self.experts.hosts, self.target],
            texts.fit_texts,
            self._hook_names[-1 - len(self.experts.hosts) :],
            tokens.hook_names,
            tokens.taking(groups_of(texts.fit_texts)),
            positions=self.reading,
            spans=self._spans_to_read(texts),
            sample=sample,
            stored=self.experts.tokens,
            batch_size=self.config.batch_size,
            progress=self.progress,
        )
        if pairs_too:
            self._tokens_of_pairs(texts, tokens)
        return states

    def _sample(self, texts: FitTexts) -> TokenSample | None:
        if self.config.mi_on != "tokens" or not self.experts.are_models:
            return None
        return TokenSample(COMPARED, len(texts.fit_texts), self._hook_names)

    def _compared_states(
        self,
        sample: TokenSample | None,
        texts: FitTexts,
        anchors: Sequence[ActivationStore],
    ) -> tuple[ActivationStore | None, ActivationStore | None]:
        """The states of a sample, equal texts as one group; none where most texts have no token in
        common, or there are fewer rows or groups than layers can be compared on."""
        if sample is None:
            return None, None
        n_least = 2 * (self.config.mi.n_folds or 1)
        groups = groups_of(texts.fit_texts)
        n_groups = len({groups[i] for i in sample.texts})
        if sample.n < anchors[0].n or n_groups < max(n_least, len(set(groups)) / 2):
            return None, None
        *experts, target = sample.stores([model_facts(store) for store in anchors], groups)
        return self.experts.joined(experts), target

    def _tokens_of_pairs(self, texts: FitTexts, tokens: TokenPairs) -> None:
        if self.config.align_on_pairs and texts.anchors is not None:
            # The two texts of a pair are alike, and so one group.
            also, first = texts.pairs.texts, max(groups_of(texts.fit_texts)) + 1
            groups = [first + i // 2 for i in range(len(also))]
            tokens.read(self.target, also, groups, progress=self.progress)

    @property
    def _hook_names(self) -> list[list[str]]:
        """Of each expert and, last, of the target."""
        return [*self.experts.split(self.expert_hook_names).values(), self.target_hook_names]

    def _each_expert(self) -> list[tuple[str, Host | ActivationStore, list[str]]]:
        """Its name, itself, and where it is read."""
        names = self.experts.split(self.expert_hook_names)
        return [(label, source, names[label]) for label, source in self.experts.sources.items()]

    def _stored_anchors(self, texts: FitTexts) -> list[ActivationStore]:
        return [
            _rows_of_states(source, names, texts, self.reading)[0]
            for _, source, names in self._each_expert()
            if isinstance(source, ActivationStore)
        ]

    def _spans_to_read(self, texts: FitTexts) -> list[Span] | None:
        return texts.fit_spans if self.reading in OF_THE_ANSWER else None

    def _unlabelled(
        self, name: str, host: Host, texts: FitTexts, hook_names: list[str]
    ) -> ActivationStore:
        spans = self._spans_to_read(texts)
        return self.readings.read(name, host, texts.fit_texts, hook_names, spans=spans)

    def _labelled(
        self, name: str, host: Host, texts: FitTexts, hook_names: list[str]
    ) -> ActivationStore:
        pairs = texts.pairs
        spans = pairs.answer_spans if self.reading in OF_THE_ANSWER else None
        return self.readings.read(
            name, host, pairs.texts, hook_names, labels=pairs.labels, spans=spans
        )


@dataclass(frozen=True, eq=False)
class PairStates:
    """The states of both models on the labelled texts."""

    expert: ActivationStore
    target: ActivationStore
    readout: Tensor
    """See `FitData.readout`."""

    @classmethod
    def of(cls, data: FitData) -> PairStates:
        """Those that a fit had read."""
        return cls(data.expert_pair_states, data.target_pair_states, data.readout)


def made_on(target: Host) -> dict[str, Any]:
    """What decides the last digits of a fit: processor, threads, libraries."""
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": target.device.type,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }


def _of(reading: str, label: str) -> str:
    """What the reading of one of several experts is called."""
    return f"{reading} ({label})" if label else reading


def _rows_of_states(
    states: ActivationStore, names: Sequence[str], texts: FitTexts, positions: ReadPositions
) -> tuple[ActivationStore, ActivationStore]:
    """The anchors' and the pairs' rows of states captured before.

    Raises:
        DataError: they are of other texts, or of another token of each.
    """
    pairs, anchors = texts.pairs, texts.anchors
    expected = [*pairs.texts, *(anchors or ())]
    command = "ExpertSteer(...).capture(expert, pairs, anchors=anchors)"
    facts = states.provenance
    if states.n != len(expected) or not are_states_of(facts, expected):
        raise DataError(
            f"expert holds states of {states.n} texts, which are not the {len(expected)} of pairs "
            f"and anchors, in this order; make them with {command}."
        )
    if facts.get("positions", positions) != positions:
        raise DataError(
            f"expert holds states read at positions={facts['positions']!r}, but "
            f"config.reading is {positions!r}; read and fit at the same token."
        )
    wanted = [list(span) for span in spans_to_read(pairs, anchors)]
    if positions in OF_THE_ANSWER and facts.get("spans", wanted) != wanted:
        raise DataError(
            "expert holds states of other parts of these texts than their answers; make them with "
            "ExpertSteer(...).capture(expert, pairs, anchors=anchors)."
        )
    # An anchor that is also a text of the pairs was read twice, on other words. Reversed: of a text
    # that comes twice among the anchors the first row stands for both.
    first = 0 if anchors is None else len(pairs.texts)
    row = {text: i for i, text in reversed(list(enumerate(expected))) if i >= first}
    fitted = states.select([row[text] for text in texts.fit_texts], hook_names=names)
    labelled = states.select(range(len(pairs.texts)), hook_names=names)
    return (
        ActivationStore(fitted.activations, provenance=facts),  # without labels
        ActivationStore(labelled.activations, pairs.labels, facts),
    )
