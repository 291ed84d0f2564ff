"""The models of the benchmark on real models: their states on the tasks, maps between them, and
what a direction does to a target."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.align import Aligner, PairedMoments
from expertsteer_lens.align import fit_aligner_grid_from_moments as fit_maps
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text
from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.measure.neutral import NeutralTexts
from expertsteer_lens.measure.prepared import Completions, CompletionScores
from expertsteer_lens.pipeline.asking import ask_about
from expertsteer_lens.pipeline.config import ExpertSteerConfig
from expertsteer_lens.pipeline.instructed import log_probs_under
from expertsteer_lens.pipeline.labelling import flatten_axes
from expertsteer_lens.pipeline.token_pairs import TokenPairs
from expertsteer_lens.steer.plan import SteeringPlan

from .tasks import Form, TransferTask

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host

Row = dict[str, Any]
ENDS = (0.1, 0.9)
"""Depths of the blocks that a direction is written to as a control."""


class Side:
    """A model of the benchmark, and its states on the tasks."""

    def __init__(self, name: str, model: Any, batch_size: int) -> None:
        self.name, self.model, self.batch_size = name, model, batch_size
        self.host: Host = as_host(model)
        template = getattr(self.host.tokenizer, "chat_template", None)
        self.form: Form = "chat" if template else "plain"
        self.hooks: list[str] = list(self.host.hook_names())
        self._states: dict[tuple[str, Form], ActivationStore] = {}
        self._layers: dict[tuple[str, Form, int], list[Tensor]] = {}
        self._asked: dict[str, Tensor] = {}
        self._log_probs: dict[tuple[str, str | None], Tensor] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """What a run says of this model; its dtype where that is not float32."""
        dtype = str(self.host.dtype).removeprefix("torch.")
        return self.host.facts() | ({} if dtype == "float32" else {"dtype": dtype})

    def at(self, depth: float) -> str:
        """The residual after the block at this share of the depth."""
        return self.hooks[max(1, min(round(depth * len(self.hooks)), len(self.hooks) - 2))]

    def far_from(self, hook: str) -> str:
        """The farther of the blocks near both ends of the model."""
        ends = [self.at(depth) for depth in ENDS]
        return max(ends, key=lambda end: abs(self.hooks.index(end) - self.hooks.index(hook)))

    def states(self, task: TransferTask, form: Form | None = None) -> ActivationStore:
        """Of the texts of the task's pairs, without their labels: means over the answers."""
        form = form or self.form
        if (task.name, form) not in self._states:
            pairs = task.contrast_pairs(form)
            self._states[task.name, form] = capture(
                self.model,
                pairs.texts,
                self.hooks[1:-1],
                positions="answer",
                spans=pairs.answer_spans,
                batch_size=self.batch_size,
                progress=False,
            )
        return self._states[task.name, form]

    def labels(self, task: TransferTask) -> Tensor:
        """1 = wanted, in the order of `states`."""
        return torch.as_tensor(task.contrast_pairs(self.form).labels).long()

    def layers(self, task: TransferTask, flatten: int, form: Form) -> list[Tensor]:
        """The states of every layer in the basis of their own principal axes, the leading ones
        shrunk: no more coordinates than texts, and the scores that `label_texts` gives."""
        key = (task.name, form, flatten)
        if key not in self._layers:
            states = self.states(task, form)
            rows = [_coordinates(states[name]) for name in states]
            self._layers[key] = [flatten_axes(x, x[0], flatten)[0] for x in rows]
        return self._layers[key]

    def asked(self, task: TransferTask) -> Tensor | None:
        """How much rather the model says Yes than No when asked the task's question about each
        answer; None without a question."""
        if task.question and task.name not in self._asked:
            self._asked[task.name] = ask_about(
                self.model,
                task.question,
                task.answers,
                batch_size=self.batch_size,
                progress=False,
            )
        return self._asked.get(task.name)

    def instructed(self, task: TransferTask, instruction: str) -> Tensor:
        """How much likelier an instruction makes each answer of the task, nats per token: what
        `likelier_under` gives, without reading the answers alone again for each instruction."""
        return self._behind(task, instruction) - self._behind(task, None)

    def _behind(self, task: TransferTask, instruction: str | None) -> Tensor:
        """Log-probability of each answer behind an instruction, in the form that the model is best
        shown texts in."""
        key = task.name, instruction
        if key not in self._log_probs:
            pairs = task.contrast_pairs(self.form)
            spans = None  # of a chat the answer
            if self.form == "plain":
                answers = zip(pairs.texts, task.answers, strict=True)
                spans = [(len(str(text)) - len(answer), len(str(text))) for text, answer in answers]
            self._log_probs[key] = log_probs_under(
                self.model,
                instruction,
                pairs.texts,
                spans=spans,
                batch_size=self.batch_size,
                progress=False,
            )
        return self._log_probs[key]


class Meter:
    """Measures directions at one block and strength of a target, on the test questions of a task;
    a direction that was measured is known.

    Args:
        target: the model.
        task: its questions.
        hook: the block that is written.
        coefficient: in median norms of that block.
        neutral: texts that say what it costs.
    """

    def __init__(
        self, target: Side, task: TransferTask, hook: str, coefficient: float, neutral: NeutralTexts
    ) -> None:
        self.target, self.task, self.hook, self.coefficient = target, task, hook, coefficient
        self.norm = target.states(task).median_norm(hook)
        self.neutral = neutral
        self.completions = Completions(target.host, task.behaviour(target.form))
        self.base = self.completions.scores()
        self._known: dict[bytes, Row] = {}

    def at(self, hook: str, coefficient: float) -> Meter:
        """The same questions under another block or strength; nothing is read again."""
        other = copy.copy(self)
        other.hook, other.coefficient, other._known = hook, coefficient, {}
        other.norm = self.target.states(self.task).median_norm(hook)
        return other

    def plan(self, direction: Tensor) -> SteeringPlan:
        """The direction at this block and strength, at all positions."""
        return steered(self.target, self.hook, direction, self.coefficient, self.norm)

    def effect(self, direction: Tensor) -> Row:
        """Change of nats per answer token (wanted minus unwanted), mean over the questions."""
        key = direction.double().numpy().round(6).tobytes()
        if key not in self._known:
            self._known[key] = self.figures(self.completions.scores(self.plan(direction)))
        return dict(self._known[key])

    def costed(self, direction: Tensor) -> Row:
        """The same, with the rise of the neutral texts' NLL, nats per token."""
        return self.effect(direction) | {"nll_rise": self.cost(direction)}

    def figures(self, scores: CompletionScores) -> Row:
        """What is reported of the completions under some plan."""
        change = scores.margin_per_token() - self.base.margin_per_token()
        return {
            "effect": float(change.mean()),
            "wrong_way": float((change < 0).double().mean()),
            "accuracy": float(scores.correct(per_token=True).mean()),
        }

    def cost(self, direction: Tensor) -> float:
        """Rise of the neutral texts' NLL, nats per token."""
        return self.neutral.cost(self.plan(direction), kl=False)[0]


def steered(
    target: Side, hook: str, direction: Tensor, coefficient: float, norm: float
) -> SteeringPlan:
    """One direction at one block, at all positions, in units of this norm."""
    return SteeringPlan.from_vectors(
        {hook: direction},
        coefficient=coefficient,
        median_norms={hook: norm},
        basis=target.host.facts()["basis"],
    )


class Maps:
    """Maps from expert blocks to one target block, fitted on token pairs of the anchors and of a
    task's texts without their labels."""

    def __init__(
        self,
        expert: Side,
        target: Side,
        anchors: Sequence[str],
        hooks: Sequence[str],
        hook: str,
        form: Form,
        seed: int,
    ) -> None:
        self.expert, self.target, self.hook, self.seed = expert, target, hook, seed
        # The target is read for itself at other blocks: at the same there is nothing to map.
        self.hooks = [h for h in dict.fromkeys(hooks) if expert is not target or h != hook]
        if not self.hooks:
            self.hooks = [target.hooks[target.hooks.index(hook) - 1]]
        self.form: Form = form
        self.anchors = list(anchors)
        self.config = ExpertSteerConfig(batch_size=expert.batch_size)
        self._of_anchors: dict[str, Any] | None = None
        self._of_task: tuple[str, PairedMoments] | None = None

    def fit(self, hooks: Sequence[str], task: TransferTask | None) -> dict[str, Aligner]:
        """An aligner for each of these expert blocks; without a task from the anchors alone. The
        texts of one task are kept read, those of the last."""
        if self._of_anchors is None:  # of all blocks at once: the passes are what costs
            self._of_anchors = self._pair(self.anchors, range(len(self.anchors))).state()
        moments = PairedMoments.from_state(self._of_anchors)
        if task is not None:
            texts = task.contrast_pairs(self.form).texts
            # The two texts of a pair are a group: they share their question.
            groups = [len(self.anchors) + i // 2 for i in range(len(texts))]
            if self._of_task is None or self._of_task[0] != task.name:
                self._of_task = task.name, self._pair(texts, groups)
            moments.merge(self._of_task[1])
        pairs = [(hook, self.hook) for hook in hooks]
        fitted = fit_maps(moments, self.config.aligner, seed=self.seed, pairs=pairs)
        return {hook: fitted[hook, self.hook] for hook in hooks}

    def _pair(self, texts: Sequence[Text], groups: Sequence[int]) -> PairedMoments:
        pairs = [(hook, self.hook) for hook in self.hooks]
        tokens = TokenPairs(pairs, self.expert.model, self.config, self.seed)
        return tokens.read(self.target.host, texts, groups, progress=False).moments


def _coordinates(x: Tensor) -> Tensor:
    """Rows in the basis of their own principal axes, the largest first."""
    u, s, _ = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    coordinates: Tensor = u * s
    return coordinates
