"""The benchmark on real models: what does an expert give a target, and from how many labels?

For every task and every pair of models, directions from the same labelled pairs and the same
unlabelled texts are written to the same block of the target at the same strength. Blocks, strengths
and settings are chosen on development tasks; the test questions of the other tasks are read once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from expertsteer_lens._atomic import hold
from expertsteer_lens._checks import check_list
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.texts import text_hash
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts.facts import fingerprints_match
from expertsteer_lens.measure.neutral import NeutralTexts

from .config import TransferConfig
from .models import Maps, Meter, Row, Side
from .result import (
    ANOTHER,
    CEILING,
    COST_OF_NATIVE,
    INSTRUCTED,
    NEIGHBOUR,
    RUN_FILE,
    SAME_BUDGET,
    TransferBench,
)
from .rows import (
    choose_asking,
    choose_expert,
    choose_floor,
    choose_instructing,
    choose_labelling,
    choose_steering,
    control_rows,
    expert_rows,
    few_label_rows,
    instructed_rows,
    mapped_at_cost,
    target_rows,
)
from .tasks import Form, TransferTask

OnProgress = Callable[[str], object]
GROWING = ("tasks", "models")
"""Settings by name, to which a run that goes on may add."""


def bench_transfer(
    models: Mapping[str, Any],
    transfers: Sequence[tuple[str, str]],
    tasks: Sequence[TransferTask],
    *,
    development: Sequence[TransferTask],
    anchors: Sequence[str],
    neutral: Sequence[Text],
    config: TransferConfig | None = None,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> TransferBench:
    """Measure what experts give targets, on tasks with few labels and with all.

    Args:
        models: by name; any host object. A model without a chat template is shown
            "Question: ...\\nAnswer:".
        transfers: (expert, target) names.
        tasks: what is reported; their test questions are read once.
        development: what choices are made on: the blocks that directions are learnt at and written
            to, and their strength, for each target (its own mean difference, within the budget),
            the expert's block (its mapped mean
            difference), and how each labeller labels (agreement with the known labels).
        anchors: plain texts for the maps; about other things than the tasks.
        neutral: texts whose NLL says what a strength costs.
        config: see `TransferConfig`.
        out: folder for `run.json`, which is written after every choice and every task. A further
            run with the same settings goes on from there, also with further tasks or transfers.
        on_progress: told, in words, what is done.

    Returns:
        All rows, with tables, intervals over tasks and a figure.

    Raises:
        ArgumentError: a transfer names a model that is not given, nothing is given as anchors or
            neutral texts, or `out` holds a run with other settings, models or texts.
        ArtifactError: the run in `out` is damaged, or another process writes it.
        DataError: no task, or a task that is among the development tasks too.

    Example:
        Two tasks of a small world, one to choose on and one to report:

        >>> from expertsteer_lens import zoo
        >>> from expertsteer_lens.benchmarks.transfer import (
        ...     Answered, TransferConfig, TransferTask, bench_transfer
        ... )
        >>> both = zip(zoo.contrast_pairs().positive, zoo.contrast_pairs().negative)
        >>> rows = [
        ...     Answered(question=f"{i}?", positive=(p,), negative=(n,))
        ...     for i, (p, n) in enumerate(both)
        ... ]
        >>> one, two = (
        ...     TransferTask(name=n, domain="moods", pairs=rows[i:i + 8], tests=rows[i + 8:i + 10])
        ...     for i, n in ((0, "one"), (10, "two"))
        ... )
        >>> expert, target = zoo.load_pair()
        >>> bench = bench_transfer(
        ...     {"expert": expert, "target": target}, [("expert", "target")], [one],
        ...     development=[two], anchors=zoo.anchors(40), neutral=zoo.neutral_texts(4),
        ...     config=TransferConfig(
        ...         n_pairs=(1,), n_draws=2, n_random=2, n_shuffles=1, target_depths=(0.5,),
        ...         coefficients=(0.1,), expert_depths=(0.5,), labelling=((1, 0),), budget=5.0,
        ...     ),
        ... )
        >>> bench.transfers
        [('expert', 'target')]
    """
    config = TransferConfig() if config is None else config
    tasks, development = list(tasks), list(development)
    anchors, neutral = check_texts("anchors", anchors), check_texts("neutral", neutral)
    _check(models, transfers, tasks, development)
    sides = {name: Side(name, model, config.batch_size) for name, model in models.items()}
    # One form for all: an expert is read once, whatever the target.
    form: Form = "chat" if all(s.form == "chat" for s in sides.values()) else "plain"
    with _alone(out):
        kept = _Kept(
            out,
            {
                "config": config.to_dict(),
                "form": form,
                "anchors": text_hash(anchors),
                "neutral": text_hash(neutral),
                "development": {task.name: task.hash for task in development},
                "tasks": {task.name: task.hash for task in tasks},
                "models": {name: side.facts for name, side in sides.items()},
            },
        )
        for target in dict.fromkeys(target for _, target in transfers):
            experts = dict.fromkeys([target, *(e for e, t in transfers if t == target)])
            _Target(
                kept,
                sides[target],
                [sides[e] for e in experts],
                form,
                development,
                anchors,
                neutral,
                config,
                on_progress or (lambda line: None),
            ).measure(tasks)
        return kept.result()


def _alone(out: str | Path | None) -> AbstractContextManager[None]:
    """A block in which no other process writes the run: each would write its own rows alone."""
    if out is None:
        return nullcontext()
    return hold(Path(out) / "run", "wait for it, or give another folder as out=.")


class _Target:
    """Everything that is measured on one target: choices first, then task after task."""

    def __init__(
        self,
        kept: _Kept,
        side: Side,
        experts: Sequence[Side],
        form: Form,
        development: Sequence[TransferTask],
        anchors: Sequence[str],
        neutral: list[Text],
        config: TransferConfig,
        say: OnProgress,
    ) -> None:
        self.kept, self.side, self.development = kept, side, development
        self.neutral = NeutralTexts(side.host, neutral)
        self.config, self.say = config, say
        name = side.name
        self.steering = kept.choice(
            f"steering of {name}",
            lambda: choose_steering(side, development, self.neutral, config, say),
        )
        written = self.steering["written"]
        say(
            f"{name}: chosen: learnt at {self.steering['hook']}, written to {written}, strength "
            f"{self.steering['coefficient']:g}"
        )
        self.floor = kept.choice(
            f"floor of {name}",
            lambda: choose_floor(side, self.steering, development, self.neutral, config),
        )
        hook = self.steering["hook"]
        self.maps = {
            e.name: Maps(
                e, side, anchors, list(map(e.at, config.expert_depths)), hook, form, config.seed
            )
            for e in experts
        }
        self.settings = {e.name: self._choose(e, side.form if e is side else form) for e in experts}

    def _choose(self, expert: Side, form: Form) -> dict[str, Any]:
        """What this expert is read at, and how it labels; the target is an expert of itself."""
        name, target = expert.name, self.side.name
        itself = " itself" if expert is self.side else ""
        development, config = self.development, self.config
        read = self.kept.choice(
            f"block of {name} for {target}",
            lambda: choose_expert(
                self.maps[name], self.side, self.steering, development, self.neutral
            ),
        )
        labelling: dict[str, Any] = {"setting": None}
        if config.n_pairs:
            labelling = self.kept.choice(
                f"labelling by {name}{itself}",
                lambda: choose_labelling(expert, form, development, config),
            )
        asking = self.kept.choice(
            f"asking of {name}{itself}", lambda: choose_asking(expert, form, development, config)
        )
        instructing = self.kept.choice(
            f"instructing by {name}{itself}",
            lambda: choose_instructing(expert, form, development, config),
        )
        found = {
            "hook": read["hook"],
            "labelling": labelling["setting"],
            "asking": asking["setting"],
            "instructing": instructing["setting"],
        }
        self.say(f"{name} for {target}: {found}")
        return found

    def measure(self, tasks: Sequence[TransferTask]) -> None:
        """Every part of every task whose rows are not there yet."""
        name, steering = self.side.name, self.steering
        for task in tasks:
            meter = None
            for part in self._parts(task):
                if self.kept.has(part.expert, name, task.name, part.method, part.n_pairs):
                    continue
                if meter is None:
                    written, coefficient = steering["written"], steering["coefficient"]
                    meter = Meter(self.side, task, written, coefficient, self.neutral)
                rows = part.measure(meter)
                self.kept.add(part.expert, name, task, rows)
                self.say(f"{part.expert} → {name}, {task.name}: {part.said}, {len(rows)} rows")

    def _parts(self, task: TransferTask) -> Iterator[_Part]:
        """What is measured of a task, in order."""
        name, config = self.side.name, self.config
        who = {e: "self" if e == name else "expert" for e in self.maps}
        for e, maps in self.maps.items():
            method, rows = (CEILING, target_rows) if e == name else ("expert, mapped", expert_rows)
            measured = partial(rows, maps=maps, setting=self.settings[e], task=task, config=config)
            yield _Part(e, method, None, measured, "all pairs and none")
        for e, maps in self.maps.items():
            method = f"{who[e]}, mapped{COST_OF_NATIVE}"
            at_cost = partial(
                mapped_at_cost, maps=maps, hook=self.settings[e]["hook"], task=task, method=method
            )
            yield _Part(e, method, None, at_cost, "at the cost of native")
        controls = partial(
            control_rows,
            floor=self.floor,
            learnt_at=self.steering["hook"],
            task=task,
            config=config,
        )
        yield _Part(name, SAME_BUDGET, None, controls, "controls")
        near = [o.instruction for o in self.development if o.domain == task.domain]
        far = [o.instruction for o in self.development if o.domain != task.domain]
        for method, instructions, said in (
            (INSTRUCTED, [task.instruction], "labelled by the instruction"),
            (NEIGHBOUR, near, "labelled by a neighbour's instruction"),
            (ANOTHER, far, "labelled by other domains' instructions"),
        ):
            instructions = list(filter(None, instructions))
            for e, maps in self.maps.items():
                # Of the controls one model is enough: the one for which labels are easy to come by.
                is_left_out = e != name and method != INSTRUCTED
                if is_left_out or not instructions or not self.settings[e]["instructing"]:
                    continue
                called = f"{who[e]} as labeller{method}"
                rows = partial(
                    instructed_rows,
                    maps=maps,
                    setting=self.settings[e],
                    task=task,
                    method=called,
                    instructions=instructions,
                )
                yield _Part(e, called, None, rows, said)
        for n in config.n_pairs:
            for e, maps in self.maps.items():
                few = partial(
                    few_label_rows,
                    maps=maps,
                    setting=self.settings[e],
                    task=task,
                    n=n,
                    config=config,
                )
                if n < len(task.pairs):
                    yield _Part(e, f"{who[e]} as labeller", n, few, f"{n} labelled pairs")


@dataclass(frozen=True)
class _Part:
    """Rows of one task that are measured, and kept, together."""

    expert: str
    method: str
    """One of theirs: where it is there, all are."""
    n_pairs: int | None
    """Labelled pairs of that one; None: whatever number."""
    measure: Callable[[Meter], list[Row]]
    said: str


class _Kept:
    """Choices and rows so far, in memory and in the folder."""

    def __init__(self, out: str | Path | None, settings: dict[str, Any]) -> None:
        self.out = None if out is None else Path(out)
        self.choices: dict[str, Any] = {}
        self.rows: list[Row] = []
        self.settings = settings
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._read(self.out)

    def _read(self, out: Path) -> None:
        if not (out / RUN_FILE).exists():
            return
        found = TransferBench.read(out)
        before, now = found.settings, json.loads(json.dumps(self.settings))
        choices = dict(found.choices)
        if now["config"]["n_pairs"] and before.get("config", {}).get("n_pairs") == []:
            # What a run without few labels measured does not depend on them.
            few = {name: now["config"][name] for name in ("n_pairs", "n_draws")}
            before = {**before, "config": {**before["config"], **few}}
            choices = {n: c for n, c in choices.items() if not n.startswith("labelling")}
        # Tasks and models may be added to a run; what both know must be the same.
        different = [name for name in now if name not in GROWING and before.get(name) != now[name]]
        for group in GROWING:
            old, new = before.get(group, {}), now[group]
            different += [f"{group} {n!r}" for n in new if n in old and not _same(old[n], new[n])]
        if different:
            raise ArgumentError(
                f"out={str(out)!r} holds a run with another {', '.join(different)}; give another "
                "folder, or the same to go on."
            )
        grown = {group: {**before[group], **now[group]} for group in GROWING}
        self.settings = {**now, **grown}
        self.choices, self.rows = choices, [dict(row) for row in found.rows]

    def choice(self, name: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A choice made on development tasks, once."""
        if name not in self.choices:
            self.choices[name] = choose()
            self._write()
        made: dict[str, Any] = self.choices[name]
        return made

    def has(
        self, expert: str, target: str, task: str, method: str, n_pairs: int | None = None
    ) -> bool:
        """Whether the rows of this method are there, and so those written together with them; from
        so many labelled pairs, or any number."""
        key = (expert, target, task, method)
        return any(
            (r["expert"], r["target"], r["task"], r["method"]) == key
            and n_pairs in (None, r["n_pairs"])
            for r in self.rows
        )

    def add(self, expert: str, target: str, task: TransferTask, rows: Sequence[Row]) -> None:
        """Keep the rows of one task, and write them."""
        where = {"expert": expert, "target": target, "task": task.name, "domain": task.domain}
        self.rows += [where | row for row in rows]
        self._write()

    def result(self) -> TransferBench:
        """All rows and choices so far."""
        return TransferBench(self.rows, self.choices, self.settings)

    def _write(self) -> None:
        if self.out is not None:
            self.result().save_run(self.out)


def _same(before: Any, now: Any) -> bool:
    """Whether two are equal, fingerprints of models up to what another processor rounds."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return bool(before == now)
    a, b = dict(before), dict(now)
    return fingerprints_match(a.pop("fingerprint"), b.pop("fingerprint")) and a == b


def _check(
    models: Mapping[str, Any],
    transfers: Sequence[tuple[str, str]],
    tasks: Sequence[TransferTask],
    development: Sequence[TransferTask],
) -> None:
    for pair in check_list("transfers", transfers, of="(expert, target) names"):
        unknown = [name for name in pair if name not in models]
        if len(pair) != 2 or unknown or pair[0] == pair[1]:
            raise ArgumentError(
                f"transfers holds {pair!r}; give two different names of models={list(models)}."
            )
    if not transfers:
        raise ArgumentError("transfers is empty; give at least one (expert, target).")
    if not tasks or not development:
        raise DataError("give at least one task, and one for development.")
    names = [task.name for task in (*tasks, *development)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"tasks and development hold {twice[0]!r} twice; what is reported must be held out."
        )
