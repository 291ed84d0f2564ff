"""The directions that the benchmark on real models compares, and the choices made beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.align import AlignerConfig, fit_aligner
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.learn.config import RFMConfig
from expertsteer_lens.learn.directions import mean_difference, random_direction
from expertsteer_lens.learn.rfm import fit_rfm
from expertsteer_lens.measure.neutral import NeutralTexts
from expertsteer_lens.measure.prepared import Completions
from expertsteer_lens.measure.strengths import is_over, search
from expertsteer_lens.pipeline.labelling import best_cut, score_states

from .config import TransferConfig
from .models import Maps, Meter, Row, Side, steered
from .result import FLOOR, SAME_BUDGET, WRONG_BLOCK
from .tasks import Form, TransferTask

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Strengths that a random direction may have, in shares of that of the other directions."""
PAPER_SEEDS = 2
"""Gauges of the paper's alignment, which is free up to a rotation."""
Setting = tuple[int, int, bool]
"""How a labeller labels: `flatten`, `n_rounds`, and whether it is asked the question."""


def draws(n_of: int, n: int, config: TransferConfig) -> list[Tensor]:
    """Which pairs are labelled, draw by draw; single pairs each at most once."""
    if n >= n_of:
        return []
    seeds = [config.seed + 1000 * n + draw for draw in range(config.n_draws)]
    if n == 1:
        order = torch.randperm(n_of, generator=torch.Generator().manual_seed(config.seed))
        return [order[i : i + 1] for i in range(min(n_of, config.n_draws))]
    return [torch.randperm(n_of, generator=torch.Generator().manual_seed(s))[:n] for s in seeds]


def rows_of(pairs: Tensor) -> Tensor:
    """The texts of these pairs: pair `i` is the texts 2 i, wanted, and 2 i + 1."""
    return torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()


def label(
    labeller: Side,
    task: TransferTask,
    pairs: Tensor | None,
    setting: Sequence[int],
    form: Form,
    *,
    instruction: str | None = None,
) -> Tensor:
    """Labels of all texts from those of a few pairs, which keep their own, or from none: from the
    question, or from an instruction."""
    flatten, n_rounds, is_asked = setting
    start = labeller.asked(task) if is_asked else None
    if instruction is not None:
        start = labeller.instructed(task, instruction)
    layers, labels = labeller.layers(task, flatten, form), labeller.labels(task)
    rows = None if pairs is None else rows_of(pairs)
    scores = score_states(
        None if rows is None else [x[rows] for x in layers],
        None if rows is None else labels[rows].float(),
        layers,
        n_rounds=n_rounds,
        start=start,
    )
    found = (scores > best_cut(scores)).long()
    if rows is not None:
        found[rows] = labels[rows]
    return found


# -- rows -----------------------------------------------------------------------------------------


def target_rows(
    meter: Meter, maps: Maps, setting: dict[str, Any], task: TransferTask, config: TransferConfig
) -> list[Row]:
    """What needs no expert: random directions at the strength of all others, shuffled labels,
    prompting, the target's own directions, the target as its own labeller and as its own expert."""
    target = meter.target
    own, labels = target.states(task)[maps.hook], target.labels(task)
    n_all = len(task.pairs)
    rows = [_row("unsteered", 0, 0, meter.figures(meter.base)), _prompting(meter, task)]

    def add(method: str, n: int, draw: int, direction: Tensor, cost: bool = False) -> None:
        """One more row, of the measured figures of a direction."""
        figures = meter.costed(direction) if cost else meter.effect(direction)
        rows.append(_row(method, n, draw, figures))

    for seed in range(config.n_random):
        add(FLOOR, 0, seed, random_direction(own.shape[1], seed=config.seed + seed))
    for seed in range(config.n_shuffles):
        g = torch.Generator().manual_seed(config.seed + seed)
        add(
            "shuffled labels",
            n_all,
            seed,
            mean_difference(own, labels[torch.randperm(len(labels), generator=g)]),
            cost=True,
        )
    add("native", n_all, 0, mean_difference(own, labels), cost=True)
    add("native RFM", n_all, 0, _rfm(own, labels, config), cost=True)
    rows += _mapped(meter, maps, setting["hook"], task, config, "self")
    return rows + _asked(meter, maps.hook, target, target.form, task, setting, "self")


def control_rows(
    meter: Meter,
    floor: Mapping[str, Any],
    learnt_at: str,
    task: TransferTask,
    config: TransferConfig,
) -> list[Row]:
    """Random directions and, written far away, the target's own; each at its own strength within
    the budget.

    Args:
        meter: of the task, at the block that is written.
        floor: strengths and their costs, a number a seed, from `choose_floor`.
        learnt_at: the block that the target's own direction is learnt at.
        task: what is measured.
        config: numbers of random directions, seed.
    """
    target = meter.target
    states = target.states(task)[learnt_at]
    rows = []
    for seed in range(config.n_random):
        direction = random_direction(states.shape[1], seed=config.seed + seed)
        # Costed anew: the strength is in norms of this task's states, the budget was kept in those
        # of the development tasks.
        figures = meter.at(meter.hook, floor["coefficients"][seed]).costed(direction)
        rows.append(_row(SAME_BUDGET, 0, seed, figures))
    there = meter.at(target.far_from(meter.hook), meter.coefficient)
    own = mean_difference(states, target.labels(task))
    coefficient, rise = _within_budget(
        target, there.hook, own, there.norm, meter.coefficient, meter.neutral, config
    )
    figures = meter.at(there.hook, coefficient).effect(own)
    return [*rows, _row(WRONG_BLOCK, len(task.pairs), 0, figures) | {"nll_rise": rise}]


def expert_rows(
    meter: Meter, maps: Maps, setting: dict[str, Any], task: TransferTask, config: TransferConfig
) -> list[Row]:
    """What the expert adds: its directions through the maps, and its labels."""
    rows = _mapped(meter, maps, setting["hook"], task, config, "expert")
    rows += _asked(meter, maps.hook, maps.expert, maps.form, task, setting, "expert")
    return rows + _by_the_paper(meter, maps, setting["hook"], task, config)


def few_label_rows(
    meter: Meter,
    maps: Maps,
    setting: dict[str, Any],
    task: TransferTask,
    n: int,
    config: TransferConfig,
) -> list[Row]:
    """Directions from `n` labelled pairs, a row a draw, with what each costs: on the labels that
    the expert of these maps gives all texts; where that is the target itself, also its own from the
    pairs alone."""
    target, labeller = meter.target, maps.expert
    own, labels = target.states(task)[maps.hook], target.labels(task)
    itself, rows = labeller is target, []
    for draw, pairs in enumerate(draws(len(task.pairs), n, config)):
        if itself:
            few = rows_of(pairs)
            figures = meter.costed(mean_difference(own[few], labels[few]))
            rows.append(_row("native", n, draw, figures))
        form = target.form if itself else maps.form
        found = label(labeller, task, pairs, setting["labelling"], form)
        figures = meter.costed(mean_difference(own, found))
        row = _row(f"{'self' if itself else 'expert'} as labeller", n, draw, figures)
        rows.append(row | {"agreement": _right(found, labels, pairs)})
    return rows


def _by_the_paper(
    meter: Meter, maps: Maps, hook: str, task: TransferTask, config: TransferConfig
) -> list[Row]:
    """The paper's alignment: states of the task's own texts, reconstructed and not anchored."""
    states = maps.expert.states(task, maps.form)[hook]
    there = meter.target.states(task, maps.form)[maps.hook]
    labels, rows = meter.target.labels(task), []
    for seed in range(PAPER_SEEDS):
        aligner = fit_aligner(
            states, there, AlignerConfig(kind="autoencoder"), seed=config.seed + seed
        )
        direction = _rfm(aligner.encode(states), labels, config)
        rows.append(_row("paper's alignment", len(task.pairs), seed, meter.costed(direction)))
    return rows


def _mapped(
    meter: Meter, maps: Maps, hook: str, task: TransferTask, config: TransferConfig, who: str
) -> list[Row]:
    states, labels = maps.expert.states(task, maps.form)[hook], maps.expert.labels(task)
    aligner, foreign = maps.fit([hook], task)[hook], maps.fit([hook], None)[hook]
    mapped, n_all = aligner.encode(states), len(task.pairs)
    rows = [
        _row(f"{who}, mapped", n_all, 0, meter.costed(mean_difference(mapped, labels))),
        _row(f"{who}, mapped RFM", n_all, 0, meter.costed(_rfm(mapped, labels, config))),
        _row(
            f"{who}, mapped by anchors alone",
            n_all,
            0,
            meter.costed(mean_difference(foreign.encode(states), labels)),
        ),
    ]
    for row in rows:
        row["r2"] = aligner.quality.r2 if "alone" not in row["method"] else foreign.quality.r2
    return rows


def mapped_at_cost(
    meter: Meter, maps: Maps, hook: str, task: TransferTask, method: str
) -> list[Row]:
    """The mapped mean difference at the strength that costs what the target's own costs."""
    aligner = maps.fit([hook], task)[hook]
    mapped = aligner.encode(maps.expert.states(task, maps.form)[hook])
    own = mean_difference(meter.target.states(task)[maps.hook], meter.target.labels(task))
    direction = mean_difference(mapped, maps.expert.labels(task))
    row = _row(method, len(task.pairs), 0, _at_cost(meter, direction, meter.cost(own)))
    return [row | {"r2": aligner.quality.r2}]


def _at_cost(meter: Meter, direction: Tensor, cost: float) -> Row:
    """Figures at the strength that costs as much, within 2 %: two directions of one length need not
    do the same damage. At the strength of all others where that cost is no rise; at the one that
    comes nearest where none up to four times that meets it."""
    from scipy.optimize import brentq

    given = meter.coefficient
    if cost <= 0:
        return meter.costed(direction)
    rises = {0.0: 0.0}

    def over(coefficient: float) -> float:
        """How much more it costs; 0 ends the search."""
        if coefficient not in rises:
            rises[coefficient] = meter.at(meter.hook, coefficient).cost(direction)
        more = rises[coefficient] - cost
        return 0.0 if abs(more) <= 0.02 * cost else more

    low, high = 0.0, given
    while over(high) < 0 and high < 4 * given:
        low, high = high, min(1.3 * high, 4 * given)
    if over(high) > 0:
        brentq(over, low, high, xtol=0.005 * given)
    del rises[0.0]
    nearest = min(rises, key=lambda coefficient: abs(rises[coefficient] - cost))
    return meter.at(meter.hook, nearest).effect(direction) | {"nll_rise": rises[nearest]}


def _asked(
    meter: Meter,
    learnt_at: str,
    labeller: Side,
    form: Form,
    task: TransferTask,
    setting: dict[str, Any],
    who: str,
) -> list[Row]:
    """The target's own mean difference on the labels of a labeller that is asked the task's
    question, without a labelled pair; no row where there is none."""
    if not task.question or not setting["asking"]:
        return []
    own, truth = meter.target.states(task)[learnt_at], meter.target.labels(task)
    found = label(labeller, task, None, setting["asking"], form)
    row = _row(f"{who} as labeller", 0, 0, meter.costed(mean_difference(own, found)))
    return [row | {"agreement": _right(found, truth)}]


def instructed_rows(
    meter: Meter,
    maps: Maps,
    setting: dict[str, Any],
    task: TransferTask,
    method: str,
    instructions: Sequence[str],
) -> list[Row]:
    """The target's own mean difference on the labels that the expert of these maps gives by how
    much likelier an instruction makes each text, without a labelled pair: a row an instruction."""
    target, labeller = meter.target, maps.expert
    form = target.form if labeller is target else maps.form
    rows = []
    for i, instruction in enumerate(instructions):
        how = setting["instructing"]
        found = label(labeller, task, None, how, form, instruction=instruction)
        direction = mean_difference(target.states(task)[maps.hook], found)
        row = _row(method, 0, i, meter.costed(direction))
        rows.append(row | {"agreement": _right(found, target.labels(task))})
    return rows


def _prompting(meter: Meter, task: TransferTask) -> Row:
    asked = Completions(meter.target.host, task.behaviour(meter.target.form, instructed=True))
    return _row("prompting", 0, 0, meter.figures(asked.scores()))


def _rfm(states: Tensor, labels: Tensor, config: TransferConfig) -> Tensor:
    groups = torch.arange(len(labels)) // 2
    return fit_rfm(states, labels, RFMConfig(), seed=config.seed, groups=groups).direction


def _row(method: str, n_pairs: int, draw: int, figures: Row) -> Row:
    return {"method": method, "n_pairs": n_pairs, "draw": draw, **figures}


# -- choices on development tasks -----------------------------------------------------------------


def choose_steering(
    target: Side,
    tasks: Sequence[TransferTask],
    neutral: NeutralTexts,
    config: TransferConfig,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """The block that the target's own mean difference is best learnt at; then the block that it is
    best written to, and how strongly: what does most within the budget. `say` is told of each."""
    tried: list[dict[str, Any]] = []
    meters = [Meter(target, task, target.at(0.5), 1.0, neutral) for task in tasks]

    def best(pairs: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
        """Of blocks to learn at and to write to."""
        for hook, written in pairs:
            for coefficient in sorted(config.coefficients):
                found = []
                for meter in meters:
                    own = mean_difference(
                        target.states(meter.task)[hook], target.labels(meter.task)
                    )
                    figures = meter.at(written, coefficient).costed(own)
                    found.append((figures["effect"], figures["nll_rise"]))
                effect, rise = torch.tensor(found).mean(0).tolist()
                row = {"hook": hook, "written": written, "coefficient": coefficient}
                tried.append(row | {"effect": effect, "nll_rise": rise})
                say(
                    f"{target.name}: learnt at {hook}, written to {written}, strength "
                    f"{coefficient:g}: {effect:+.2f} nats a token, neutral NLL {rise:+.3f}"
                )
                if is_over(rise, config.budget):  # a larger one costs more
                    break
        within = [row for row in tried if row["nll_rise"] <= config.budget]
        return max(within, key=lambda row: row["effect"]) if within else None

    hooks = dict.fromkeys(target.at(depth) for depth in config.target_depths)
    at_home = best([(hook, hook) for hook in hooks])
    if at_home is None:
        raise ArgumentError(
            f"coefficients={config.coefficients}: with each of them the target {target.name!r} "
            f"loses more than budget={config.budget:g} nats per token on the neutral texts; try "
            "smaller ones."
        )
    learnt = at_home["hook"]
    others = dict.fromkeys(target.at(depth) for depth in config.write_depths)
    chosen = best([(learnt, written) for written in others if written != learnt])
    assert chosen is not None  # at home at least
    return {**chosen, "tried": tried}


def choose_floor(
    target: Side,
    steering: Mapping[str, Any],
    tasks: Sequence[TransferTask],
    neutral: NeutralTexts,
    config: TransferConfig,
) -> dict[str, Any]:
    """For each random direction the largest strength within the budget at the block that is
    written, no larger than that of the other directions."""
    hook, largest = steering["written"], steering["coefficient"]
    norms = [target.states(task).median_norm(hook) for task in tasks]
    norm = sum(norms) / len(norms)
    found = [
        _within_budget(target, hook, direction, norm, largest, neutral, config)
        for direction in (
            random_direction(target.host.facts()["d_model"], seed=config.seed + seed)
            for seed in range(config.n_random)
        )
    ]
    coefficients, rises = zip(*found, strict=True)
    return {"coefficients": list(coefficients), "nll_rise": list(rises)}


def _within_budget(
    target: Side,
    hook: str,
    direction: Tensor,
    norm: float,
    largest: float,
    neutral: NeutralTexts,
    config: TransferConfig,
) -> tuple[float, float]:
    """The largest strength within the budget, up to the one given, and what it costs; the smallest
    that was tried where none is within it."""

    def cost(coefficient: float) -> dict[str, float]:
        """Row of one strength for the search."""
        plan = steered(target, hook, direction, coefficient, norm)
        return {"coefficient": coefficient, "cost": neutral.cost(plan, kl=False)[0]}

    rows = search(cost, [largest * share for share in SHARES], config.budget, largest)
    best = ([row for row in rows if row["cost"] <= config.budget] or rows[:1])[-1]
    return best["coefficient"], best["cost"]


def choose_expert(
    maps: Maps,
    target: Side,
    steering: dict[str, Any],
    tasks: Sequence[TransferTask],
    neutral: NeutralTexts,
) -> dict[str, Any]:
    """The expert's block whose mapped mean difference does most, steered as the others are."""
    totals: dict[str, float] = dict.fromkeys(maps.hooks, 0.0)
    for task in tasks:
        meter = Meter(target, task, steering["written"], steering["coefficient"], neutral)
        for hook, aligner in maps.fit(maps.hooks, task).items():
            mapped = aligner.encode(maps.expert.states(task, maps.form)[hook])
            direction = mean_difference(mapped, target.labels(task))
            totals[hook] += meter.effect(direction)["effect"] / len(tasks)
    return {"hook": max(totals, key=totals.__getitem__), "tried": totals}


def choose_labelling(
    labeller: Side, form: Form, tasks: Sequence[TransferTask], config: TransferConfig
) -> dict[str, Any]:
    """How the labeller labels most texts right, mean over tasks, numbers of pairs and draws."""
    jobs = [
        (task, pairs)
        for task in tasks
        for n in config.n_pairs
        for pairs in draws(len(task.pairs), n, config)
    ]
    return _best_labelling(labeller, form, jobs, config, asked=(False, True))


def choose_asking(
    labeller: Side, form: Form, tasks: Sequence[TransferTask], config: TransferConfig
) -> dict[str, Any]:
    """The same without a labelled pair."""
    return _best_labelling(labeller, form, [(task, None) for task in tasks], config, asked=(True,))


def choose_instructing(
    labeller: Side, form: Form, tasks: Sequence[TransferTask], config: TransferConfig
) -> dict[str, Any]:
    """The same from the tasks' instructions."""
    jobs = [(task, None) for task in tasks] if all(task.instruction for task in tasks) else []
    return _best_labelling(labeller, form, jobs, config, asked=(False,), by_instruction=True)


def _right(found: Tensor, truth: Tensor, pairs: Tensor | None = None) -> float:
    """Share of labels that are right, of texts whose label was not given by these pairs."""
    own = torch.ones(len(truth), dtype=torch.bool)
    if pairs is not None:
        own[rows_of(pairs)] = False
    return float((found == truth)[own].double().mean())


def _best_labelling(
    labeller: Side,
    form: Form,
    jobs: Sequence[tuple[TransferTask, Tensor | None]],
    config: TransferConfig,
    asked: tuple[bool, ...],
    by_instruction: bool = False,
) -> dict[str, Any]:
    tried: dict[Setting, float] = {}
    for flatten, n_rounds in config.labelling if jobs else ():
        for is_asked in asked:
            if is_asked and not all(task.question for task, _ in jobs):
                continue
            setting = (flatten, n_rounds, is_asked)
            right = [
                _right(
                    label(
                        labeller,
                        t,
                        pairs,
                        setting,
                        form,
                        instruction=t.instruction if by_instruction else None,
                    ),
                    labeller.labels(t),
                    pairs,
                )
                for t, pairs in jobs
            ]
            tried[setting] = sum(right) / len(right)
    best = max(tried, key=tried.__getitem__) if tried else None
    return {
        "setting": None if best is None else list(best),
        "agreement": {str(setting): share for setting, share in tried.items()},
    }
