"""The readings of a fit, in turn; those that are whole are kept if the user stops it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import keep_finished
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text
from expertsteer_lens.data.read_positions import ReadPositions
from expertsteer_lens.data.texts import are_states_of
from expertsteer_lens.errors import ArgumentError, Interrupted
from expertsteer_lens.hosts import capture

if TYPE_CHECKING:
    from expertsteer_lens.data.spans import Span
    from expertsteer_lens.hosts import Host


@dataclass(frozen=True, eq=False)
class FinishedReadings:
    """What a fit had read when the user stopped it before all was read."""

    stores: dict[str, ActivationStore]
    """By what was read, e.g. "expert on anchors"."""

    def __repr__(self) -> str:
        return f"FinishedReadings({', '.join(self.stores)})"


class TextReader:
    """Reads models on lists of texts, and passes over what was read before.

    Args:
        reading: what state represents a text.
        batch_size: see `capture`.
        progress: see `capture`.
        finished: what a fit with the same arguments had read.
    """

    def __init__(
        self,
        *,
        reading: ReadPositions,
        batch_size: int,
        progress: bool | None,
        finished: FinishedReadings | None,
    ) -> None:
        self.reading, self.batch_size, self.progress = reading, batch_size, progress
        self.stores = {} if finished is None else dict(finished.stores)

    def read(
        self,
        name: str,
        host: Host,
        texts: Sequence[Text],
        hook_names: Sequence[str],
        *,
        labels: Any = None,
        spans: Sequence[Span] | None = None,
    ) -> ActivationStore:
        """The states of a model on these texts.

        Raises:
            ArgumentError: what was read before is something else.
            Interrupted: the user stopped it, and something was read before.
        """
        before = self.stores.get(name)
        if before is not None:
            self._check(name, before, host, texts, hook_names, spans)
            return before
        with self.keeping():
            self.stores[name] = capture(
                host.model,
                texts,
                hook_names,
                labels=labels,
                positions=self.reading,
                spans=spans,
                batch_size=self.batch_size,
                progress=self.progress,
            )
        return self.stores[name]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A block in which what was read is not lost if the user stops it or a reading fails: the
        error then has it as `finished`.

        Raises:
            Interrupted: the user stopped it, and something was read before.
        """
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as stop:
            if not self.stores:
                raise
            raise Interrupted(
                f"stopped after the states of {' and '.join(self.stores)} were read, which are "
                "kept: catch `errors.Interrupted as stop` and call fit again with the same "
                "arguments and finished=stop.finished.",
                FinishedReadings(dict(self.stores)),
            ) from stop
        except Exception as error:
            if self.stores:
                what = f"the states of {' and '.join(self.stores)}"
                keep_finished(error, FinishedReadings(dict(self.stores)), what, "fit")
            raise

    def _check(
        self,
        name: str,
        store: ActivationStore,
        host: Host,
        texts: Sequence[Text],
        hook_names: Sequence[str],
        spans: Sequence[Span] | None,
    ) -> None:
        facts = store.provenance
        dtype = str(host.dtype).removeprefix("torch.")
        wanted = None if spans is None else [list(span) for span in spans]
        same = {
            name.split()[0]: facts.get("fingerprint") == host.fingerprint,
            "texts": store.n == len(texts) and are_states_of(facts, texts),
            "config.reading": facts.get("positions") == self.reading
            and (wanted is None or facts.get("spans", wanted) == wanted),
            "hook_names": list(store) == list(hook_names),
            f"dtype of the {name.split()[0]}": facts.get("dtype", dtype) == dtype,
            f"host of the {name.split()[0]}": facts.get("host", host.kind) == host.kind,
        }
        check_same(same)


def check_same(same: dict[str, bool]) -> None:
    """Raise `ArgumentError` for the first thing that is another than in the fit that was
    stopped."""
    other = [name for name, is_same in same.items() if not is_same]
    if other:
        raise ArgumentError(
            f"finished holds states of a fit with another {other[0]}; pass the arguments of the "
            "fit that was stopped, or leave finished out."
        )
