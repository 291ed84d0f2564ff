"""Made-up result objects with known numbers, for the tests of figures and report: no model is
run."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch

from expertsteer_lens.evaluation.run import FLOOR, Evaluation, EvaluationRow
from expertsteer_lens.measure.calibration import Calibration
from expertsteer_lens.pair.mutual_information import LayerPairMI, MIConfig
from expertsteer_lens.pair.rules import LayerPair, LayerPairs


def names(n: int) -> tuple[str, ...]:
    return tuple(f"blocks.{i}.hook_resid_post" for i in range(n))


def _filled(cls: Any, **values: Any) -> Any:
    """`cls` from the values that it has fields for, so that one more measured column needs no
    change here."""
    known = {f.name for f in fields(cls)}
    return cls(**{k: v for k, v in values.items() if k in known})


def layer_pair_mi(
    n_expert: int = 3, n_target: int = 4, *, estimator: str = "cca", n_permutations: int = 5
) -> LayerPairMI:
    matrix = torch.arange(n_expert * n_target, dtype=torch.float64).view(n_expert, n_target) / 8
    null = torch.full((n_permutations, n_expert, n_target), 0.25, dtype=torch.float64)
    null += 0.01 * torch.arange(n_permutations)[:, None, None]
    return LayerPairMI(
        matrix=matrix,
        interval=torch.stack([matrix - 0.0625, matrix + 0.125], dim=-1),
        null=null,
        expert_hook_names=names(n_expert),
        target_hook_names=names(n_target),
        n_samples=77,
        n_components=4,
        clipped={"expert": {}, "target": {}},
        config=MIConfig(estimator=estimator, n_permutations=n_permutations),
        seed=0,
    )


def layer_pairs(n_expert: int = 3, n_target: int = 4, *, rule: str = "attribution") -> LayerPairs:
    scores = torch.linspace(-2, 1, n_expert * n_target, dtype=torch.float64).view(
        n_expert, n_target
    )
    scores[:, 0] = torch.nan
    e, t = names(n_expert), names(n_target)
    chosen = (
        LayerPair(e[2], t[3], float(scores[2, 3])),
        LayerPair(e[0], t[1], float(scores[0, 1])),
    )
    return LayerPairs(chosen, rule, scores, e, t)


def calibration(*, effect: bool = True) -> Calibration:
    """The cost exceeds the budget of 0.1 from 0.3 on, dips at 0.4, and exceeds it at -0.2."""
    cost = {-0.2: 0.2, -0.1: 0.04, 0.0: 0.0, 0.1: 0.02, 0.2: 0.09, 0.3: 0.12, 0.4: 0.08}
    curve = [
        {
            "coefficient": c,
            "cost": v,
            **({"effect": 5 * c, "effect_se": 0.1, "band": "usable"} if effect else {}),
        }
        for c, v in cost.items()
    ]
    return _filled(
        Calibration,
        coefficient=0.2,
        coefficients={names(2)[1]: 0.2},
        budget=0.1,
        unit="nll",
        curve=tuple(curve),
        texts_hash="0" * 16,
        n_texts=9,
    )


def evaluation(
    *, ceiling: bool = True, plan: float = 1.0, name: str = "paper <preset>"
) -> Evaluation:
    def row(
        method: str, role: str, effect: float, coefficient: float = 0.1, seed: int = 0
    ) -> EvaluationRow:
        return _filled(
            EvaluationRow,
            method=method,
            role=role,
            seed=seed,
            hook_names=names(2)[1:],
            coefficient=coefficient,
            effect=effect,
            low=effect - 0.25,
            high=effect + 0.5,
            accuracy=0.75,
            nll_rise=0.05,
            kl=0.02,
            per_prompt=torch.full((4,), effect),
            correct=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        )

    rows = [row("this plan", "plan", plan)]
    rows += [
        row("random (same norm)", "control", e, seed=i) for i, e in enumerate((0.3, -0.2, 0.1))
    ]
    rows += [row(FLOOR, "floor", e, seed=i) for i, e in enumerate((0.0, 0.2, -0.2))]
    rows += [
        row("wrong layer", "control", 0.2),
        row("prompting", "baseline", 0.7, 0.0),
        row(name, "compared", -0.3),
    ]
    rows += (
        [row("native RFM", "ceiling", 1.25), row("native mean difference", "ceiling", 0.8)]
        if ceiling
        else []
    )
    return _filled(
        Evaluation,
        rows=tuple(rows),
        base_metric=-0.5,
        base_accuracy=0.5,
        budget=0.1,
        provenance={"seed": 0},
    )


def fit(*, expert: str = "an expert", target: str = "a target") -> Any:
    """What the report reads of an `ExpertSteering`."""
    import pandas as pd

    facts = {"d_model": 8, "n_layers": 3}
    return SimpleNamespace(
        layer_pair_mi=layer_pair_mi(),
        layer_pairs=layer_pairs(),
        seed=7,
        provenance={"expert": {"name": expert, **facts}, "target": {"name": target, **facts}},
        summary=lambda: f"{expert} → {target}\n  capture  1.0 s",
        to_pandas=lambda: pd.DataFrame(
            {"expert": [names(3)[2]], "target": [names(4)[3]], "score": [1.23456]}
        ),
    )
