"""Running a saved fit again, from what it recorded and the texts it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens._html import repr_html
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import ContrastPairs, text_hash
from expertsteer_lens.data.parts import groups_of, hashes_of
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host, fingerprints_match

from .expert_steer import ExpertSteer
from .experts import Experts
from .fit_data import PairKey, divide_texts
from .fitted import ExpertSteering

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.hosts import Host


LEAST_COSINE = 1 - 1e-6
"""Between two directions that are the same up to rounding."""


@dataclass(frozen=True, eq=False)
class Reproduction:
    """A saved fit beside one made again from its settings, seed and texts."""

    cosines: dict[PairKey, float]
    """Of the two directions of each layer pair that both fits have."""
    bit_equal: bool
    """Whether all directions are equal bit by bit, the layer pairs fitted and chosen are the same,
    and so are all layer-pair scores."""
    same_machine: bool
    """Whether both were made on the same kind of processor, with as many threads and the same
    library versions, as far as the saved fit says; where it was, they must be equal bit by bit."""
    differences: tuple[str, ...]
    """What differs, in words: circumstances first, results after."""
    chosen: tuple[PairKey, ...]
    """The layer pairs that the saved fit chose."""
    agrees: bool
    """Whether the same layer pairs were fitted and chosen, with directions whose cosine is at least
    `LEAST_COSINE`."""
    seconds: float
    """What the fit took this time."""

    @property
    def reproduced(self) -> bool:
        """Whether it came out as it must: on the same machine bit by bit, else to
        `LEAST_COSINE`."""
        return self.bit_equal if self.same_machine else self.agrees

    @property
    def verdict(self) -> str:
        """In one sentence."""
        least = min(self.cosines.values(), default=float("nan"))
        if self.bit_equal:
            return f"Reproduced: all {len(self.cosines)} directions are equal bit by bit."
        how = f"smallest cosine of {len(self.cosines)} directions {least:.9f}"
        if self.agrees and not self.same_machine:
            return f"Reproduced up to rounding: {how}."
        if self.agrees:
            return f"Not reproduced bit by bit on the same kind of machine: {how}."
        return f"Not reproduced: {how}; see what differs."

    def to_pandas(self) -> pandas.DataFrame:
        """One row per layer pair that both fits have."""
        import pandas as pd

        rows = [
            {"expert": e, "target": t, "chosen": (e, t) in self.chosen, "1 - cosine": 1 - cosine}
            for (e, t), cosine in self.cosines.items()
        ]
        return pd.DataFrame(rows, columns=["expert", "target", "chosen", "1 - cosine"])

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        return "\n".join([self.verdict, *(f"  {what}" for what in self.differences)])


def reproduce(
    saved: ExpertSteering,
    expert: Any,
    target: Any,
    pairs: ContrastPairs,
    *,
    anchors: Sequence[Text] | None = None,
    progress: bool | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    expert_tokens: ActivationStore | None = None,
) -> Reproduction:
    """Fit again with the settings, the seed and the hook points of a saved fit, and compare.

    The texts must be those of the fit, by the hashes it recorded; its prompts and neutral texts it
    has itself. The two models are compared by their fingerprints.

    Args:
        saved: a fit, loaded with or without its target.
        expert: the model that taught, or the states of it that the fit was made from; or the list
            of them, in the same order.
        target: the model that was steered.
        pairs: the labelled texts of the fit.
        anchors: its unlabelled texts, if it was given any.
        progress: show progress bars; None: where standard error is a terminal.
        on_step: called with each finished step's figures.
        expert_tokens: as the fit was given them.

    Raises:
        DataError: texts other than those of the fit; the message says which.
        ArgumentError: another model, or a fit that cannot be made again from texts: one that
            `refit` made under another seed, or one of a version that recorded no hashes.
    """
    sources: dict[str, Experts | Host] = {"expert": Experts.of(expert), "target": as_host(target)}
    texts = None if anchors is None else check_texts("anchors", anchors)
    check_texts_of(saved, pairs, texts)
    for side, source in sources.items():
        _check_model(saved, side, source)
    behaviour, test_behaviour = saved.data.validation_behaviour, saved.data.test_behaviour
    divided = divide_texts(
        pairs,
        saved.config,
        saved.seed,
        anchors=texts,
        behaviour=behaviour,
        test_behaviour=test_behaviour,
        neutral=_neutral_of(saved),
    )
    if hashes_of(divided.fit_texts) != saved.data.text_hashes["anchors"]:
        raise ArgumentError(
            f"this fit divided its anchors under another seed than its own ({saved.seed}): it was "
            "made by refit(seed=...); reproduce the fit that it was made from."
        )
    again = ExpertSteer(saved.config, seed=saved.seed).fit(
        expert,
        target,
        pairs,
        anchors=texts,
        behaviour=behaviour,
        test_behaviour=test_behaviour,
        neutral=_neutral_of(saved),
        expert_hook_names=list(saved.data.expert_pair_states),
        target_hook_names=list(saved.data.target_pair_states),
        progress=progress,
        on_step=on_step,
        expert_tokens=expert_tokens,
    )
    return compare(saved, again)


def compare(saved: ExpertSteering, again: ExpertSteering) -> Reproduction:
    """Two fits that should be the same."""
    both = [key for key in saved.rfms if key in again.rfms]
    cosines, equal = {}, True
    for key in both:
        one, other = (fit.rfms[key].direction.double().cpu() for fit in (saved, again))
        cosines[key] = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        equal = equal and torch.equal(saved.rfms[key].direction, again.rfms[key].direction)
    circumstances = _circumstances(saved, again)
    results = _results(saved, again, cosines)
    same_pairs = set(saved.rfms) == set(again.rfms) and (
        saved.layer_pairs.keys() == again.layer_pairs.keys()
    )
    scores = torch.equal(saved.layer_pair_mi.matrix, again.layer_pair_mi.matrix)
    there = saved.provenance.get("made_on")
    return Reproduction(
        cosines=cosines,
        bit_equal=equal and same_pairs and scores,
        same_machine=there is not None and there == again.provenance.get("made_on"),
        differences=(*circumstances, *results),
        chosen=tuple(saved.layer_pairs.keys()),
        agrees=same_pairs and bool(both) and min(cosines.values()) >= LEAST_COSINE,
        seconds=sum(step["seconds"] for step in again.steps),
    )


def _circumstances(saved: ExpertSteering, again: ExpertSteering) -> list[str]:
    """How the two were made, where that differs."""
    out = []
    there, here = (dict(fit.provenance.get("made_on") or {}) for fit in (saved, again))
    if not there:
        out.append("the saved fit does not say what it was made on")
    for name in sorted(set(there) & set(here)):
        if there[name] != here[name]:
            out.append(f"{name}: {there[name]} then, {here[name]} now")
    for side in ("expert", "target"):
        old, new = (getattr(fit.data, f"{side}_pair_states").provenance for fit in (saved, again))
        for name in ("host", "dtype", "basis", "versions"):
            if old.get(name) != new.get(name):
                out.append(f"{side} {name}: {old.get(name)} then, {new.get(name)} now")
    if saved.data.maps_on != again.data.maps_on:
        out.append(
            f"maps were fitted on {saved.data.maps_on} then, on {again.data.maps_on} now (states "
            "of an expert that is not there give one state a text without expert_tokens: give the "
            "fit what it was given)"
        )
    return out


def _results(
    saved: ExpertSteering, again: ExpertSteering, cosines: dict[PairKey, float]
) -> list[str]:
    """What came out differently."""
    out = []
    for side in ("expert", "target"):
        for what in ("anchor", "pair"):
            old, new = (getattr(fit.data, f"{side}_{what}_states") for fit in (saved, again))
            far = max(
                float((old[name] - new[name]).norm() / old[name].norm().clamp(min=1e-30))
                for name in old
            )
            if far > 0:
                out.append(f"{side} states of the {what}s: relative difference up to {far:.1e}")
    far = float((saved.layer_pair_mi.matrix - again.layer_pair_mi.matrix).abs().max())
    if far > 0:
        out.append(f"layer-pair scores: up to {far:.1e} {saved.layer_pair_mi.unit}")
    for name in sorted(set(saved.gradients) & set(again.gradients)):
        old, new = saved.gradients[name], again.gradients[name]
        if not torch.equal(old, new):
            far = float((old - new).norm() / old.norm().clamp(min=1e-30))
            out.append(f"gradient at {name}: relative difference {far:.1e}")
    for title, one, other in (
        ("fitted only then", saved.rfms, again.rfms),
        ("fitted only now", again.rfms, saved.rfms),
    ):
        out += [f"{title}: {e} → {t}" for e, t in one if (e, t) not in other]
    keys = [fit.layer_pairs.keys() for fit in (saved, again)]
    if keys[0] != keys[1]:
        then, now = (", ".join(f"{e} → {t}" for e, t in chosen) for chosen in keys)
        out.append(f"chosen: {then} then, {now} now")
    out += [
        f"direction {e} → {t}: 1 - cosine {1 - cosine:.1e}"
        for (e, t), cosine in cosines.items()
        if not torch.equal(saved.rfms[e, t].direction, again.rfms[e, t].direction)
    ]
    return out


def check_texts_of(saved: ExpertSteering, pairs: ContrastPairs, anchors: list[Text] | None) -> None:
    """Refuse other texts than those that the fit recorded.

    Raises:
        DataError: texts other than those of the fit; the message says which.
        ArgumentError: the fit recorded none.
    """
    facts = saved.provenance
    if "anchors" not in saved.data.text_hashes or "hash" not in (facts.get("pairs") or {}):
        raise ArgumentError(
            "this fit does not say which texts it was made from (an early version saved it), so it "
            "cannot be made again."
        )
    if not isinstance(pairs, ContrastPairs):
        raise DataError(f"pairs must be ContrastPairs, got {type(pairs).__name__}.")
    given = {"pairs": (len(pairs), pairs.hash)}
    was_given = bool(facts["anchors"].get("given"))
    if was_given != (anchors is not None):
        raise DataError(
            f"the fit was {'' if was_given else 'not '}given anchors; give "
            f"{'the same ones' if was_given else 'none'}."
        )
    if anchors is not None:
        given["anchors"] = (len(anchors), text_hash(anchors))
    for name, (n, digest) in given.items():
        if digest != facts[name]["hash"]:
            raise DataError(
                f"{name} are not those of the fit: it recorded {facts[name]['n']} with hash "
                f"{facts[name]['hash']}, these are {n} with hash {digest}; give the same texts in "
                "the same order."
            )


def _check_model(saved: ExpertSteering, side: str, source: Experts | Host) -> None:
    recorded, found = saved.provenance[side], source.fingerprint
    if not fingerprints_match(str(recorded["fingerprint"]), found):
        raise ArgumentError(
            f"{side} is not the model of the fit ({recorded['name']}, fingerprint "
            f"{recorded['fingerprint']}), but has fingerprint {found}; give the same model."
        )


def _neutral_of(saved: ExpertSteering) -> list[Text] | None:
    """The neutral texts that the fit was given, in an order that divides them as they were."""
    if saved.provenance.get("neutral") is None:
        return None
    parts = []
    for texts in (saved.data.calibration_texts, saved.data.test_texts):
        groups: dict[int, list[Text]] = {}
        for text, group in zip(texts, groups_of(texts), strict=True):
            groups.setdefault(group, []).append(text)
        parts.append(list(groups.values()))
    return [text for both in zip_longest(*parts, fillvalue=[]) for g in both for text in g]
