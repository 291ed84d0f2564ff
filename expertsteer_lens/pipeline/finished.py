"""States that a fit had read when the user stopped it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from expertsteer_lens.data.read_positions import ReadPositions
from expertsteer_lens.errors import Interrupted

from .experts import Experts
from .fit_data import FitData, FitTexts
from .readings import check_same

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


@contextmanager
def keeping(data: FitData) -> Iterator[None]:
    """A block in which `data` is not lost if the user stops it.

    Raises:
        Interrupted: the user did.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "stopped after the states of both models were read, which are kept: catch "
            "`errors.Interrupted as stop` and call fit again with the same arguments and "
            "finished=stop.finished.",
            data,
        ) from stop


def check_finished(
    data: FitData,
    experts: Experts,
    target: Host,
    texts: FitTexts,
    reading: ReadPositions,
    expert_hook_names: Sequence[str],
    target_hook_names: Sequence[str],
) -> None:
    """Whether states are those that a fit would read.

    Raises:
        ArgumentError: they are of other models, texts or hook points.
    """
    facts = data.provenance
    same = {
        "expert": facts["expert"]["fingerprint"] == experts.fingerprint,
        "target": facts["target"]["fingerprint"] == target.fingerprint,
        "config.reading": facts["reading"] == reading,
        "texts": all(facts.get(name) == value for name, value in texts.facts.items())
        and data.calibration_texts == tuple(texts.calibration_texts)
        and data.test_texts == tuple(texts.test_texts),
        "expert_hook_names": list(data.expert_pair_states) == list(expert_hook_names),
        "target_hook_names": list(data.target_pair_states) == list(target_hook_names),
    }
    check_same(same)
