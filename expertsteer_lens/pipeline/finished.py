"""States that a fit had read when the user stopped it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import keep_finished
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.read_positions import ReadPositions
from expertsteer_lens.errors import Interrupted

from .config import ExpertSteerConfig, reading_settings
from .experts import Experts
from .fit_data import FitData, FitTexts
from .readings import check_same

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


@contextmanager
def keeping(data: FitData) -> Iterator[None]:
    """A block in which `data` is not lost if the user stops it or a step fails: the error then has
    it as `finished`.

    Raises:
        Interrupted: the user stopped it.
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
    except Exception as error:
        keep_finished(error, data, "the states of both models", "fit")
        raise


def read_under(
    config: ExpertSteerConfig, seed: int, experts: Experts, target: Host
) -> dict[str, Any]:
    """What decides how the texts of a fit are divided and what is read of them, besides the texts
    and the weights: seed, settings, and the kind of host and the dtype of every model."""
    models = [
        {"host": s.provenance.get("host"), "dtype": s.provenance.get("dtype")}
        if isinstance(s, ActivationStore)
        else {"host": s.kind, "dtype": str(s.dtype).removeprefix("torch.")}
        for s in (*experts.sources.values(), target)
    ]
    settings = {f"config.{name}": value for name, value in reading_settings(config).items()}
    return {"seed": seed, **settings, "models": models}


def check_finished(
    data: FitData,
    experts: Experts,
    target: Host,
    texts: FitTexts,
    reading: ReadPositions,
    expert_hook_names: Sequence[str],
    target_hook_names: Sequence[str],
    under: Mapping[str, Any],
) -> None:
    """Whether states are those that a fit would read, and its texts divided in the same way.

    Args:
        data: what a fit had read.
        experts: those of the fit that goes on, as all further arguments.
        target: the model to be steered.
        texts: divided.
        reading: what state represents a text.
        expert_hook_names: where the expert is read.
        target_hook_names: where the target is read.
        under: see `read_under`.

    Raises:
        ArgumentError: they are of other models, texts, settings or hook points, or other prompts
            choose or test.
    """
    facts = data.provenance
    before = facts.get("read_under", {})
    shown = {"models": "host or dtype of a model"}
    same = {
        "expert": facts["expert"]["fingerprint"] == experts.fingerprint,
        "target": facts["target"]["fingerprint"] == target.fingerprint,
        **{
            shown.get(name, name): before.get(name, value) == value for name, value in under.items()
        },
        "config.reading": facts["reading"] == reading,
        "behaviour": facts.get("behaviour") == texts.facts["behaviour"],
        "test_behaviour": data.test_behaviour == texts.test_behaviour
        and data.validation_behaviour == texts.validation_behaviour,
        "texts": all(
            facts.get(name) == texts.facts[name] for name in ("pairs", "anchors", "neutral")
        )
        and data.calibration_texts == tuple(texts.calibration_texts)
        and data.test_texts == tuple(texts.test_texts),
        "expert_hook_names": list(data.expert_pair_states) == list(expert_hook_names),
        "target_hook_names": list(data.target_pair_states) == list(target_hook_names),
    }
    check_same(same)
