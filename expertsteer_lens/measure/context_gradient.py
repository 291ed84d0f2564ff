"""How the effect of a plan, and its damage, change with the strength of each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text
from expertsteer_lens.errors import DataError
from expertsteer_lens.interventions.arithmetic import centre, wide
from expertsteer_lens.interventions.vector_edit import VectorEdit
from expertsteer_lens.linalg.moments import RunningMoments

from .neutral import NeutralTexts
from .prepared import Completions

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host
    from expertsteer_lens.steer.plan import SteeringPlan
    from expertsteer_lens.steer.vector import SteeringVector

    from .calibration import BudgetUnit

_Parts = Callable[[Sequence[VectorEdit], "SteeringPlan"], Iterator[Tensor]]
"""(edits, plan) to tensors whose sum is a number wanted, each with a graph to the edits' live
parameters as they are when it is asked for."""
GRAPH_LOGITS = 2**24
"""Most logits of a batch whose graph is held: 64 MiB a copy in float32."""
LARGEST_MOVE = 0.2
"""Most that the logarithm of the coefficient moves in a step."""


@dataclass(frozen=True, eq=False)
class Strengths:
    """Where learning stands: the strength of a token with activation x is
    exp(log_scale) * (1 + (x - mean) . weights), in coefficients of the plan it began with."""

    weights: tuple[Float[Tensor, " d"], ...]
    """One for each vector of the plan, float64."""
    log_scale: float


@dataclass(frozen=True, eq=False)
class Slopes:
    """A number with its derivatives."""

    value: float
    weights: tuple[Float[Tensor, " d"], ...]
    log_scale: float


@dataclass(frozen=True, eq=False)
class Measured:
    """The behaviour's log-odds (nats, mean over prompts) and the damage (nats per token)."""

    effect: Slopes
    damage: Slopes


class StrengthGradient:
    """Measures a plan of context-dependent strengths on training prompts and texts, and moves them.

    Args:
        host: the target.
        plan: its vectors add at a strength that depends on the activation.
        behaviour: prompts that are learnt from.
        texts: neutral texts that are learnt from.
        unit: what the damage is measured in, see `calibrate`.
    """

    def __init__(
        self,
        host: Host,
        plan: SteeringPlan,
        behaviour: Behaviour,
        texts: Sequence[Text],
        unit: BudgetUnit,
    ) -> None:
        self.host, self.plan, self.unit = host, plan, unit
        self._centred = (plan.basis or host.basis) == "centred"
        n_logits = max(64, GRAPH_LOGITS // host.d_vocab)
        self._prompts = Completions(host, behaviour, max_tokens=min(2048, n_logits))
        longest = max(int(host.tokenize([text]).lengths[0]) for text in texts)
        self._texts = NeutralTexts(host, texts, batch_size=max(1, n_logits // longest))
        self._n_prompts = len(behaviour)
        self._one_each = all(
            len(side) == 1 for i in range(len(behaviour)) for side in behaviour.completions(i)
        )
        with torch.no_grad():
            self._means, self._covariances = self._read_states()
        self._unsteered = float(self._prompts.scores().log_odds().mean())

    def start(self) -> Strengths:
        """The fixed strength."""
        return Strengths(tuple(torch.zeros_like(mean) for mean in self._means), 0.0)

    def plan_at(self, at: Strengths) -> SteeringPlan:
        """The plan with these strengths."""
        scale = math.exp(at.log_scale)

        def placed(vector: SteeringVector, weights: Tensor, mean: Tensor) -> SteeringVector:
            values = {"weights": weights, "bias": 1.0 - mean @ weights}
            return replace(vector, coefficient=vector.coefficient * scale, parameters=values)

        vectors = map(placed, self.plan.vectors, at.weights, self._means)
        return replace(self.plan, vectors=tuple(vectors))

    def shown(self, at: Strengths) -> dict[str, float]:
        """The coefficient, and how far the strengths of tokens are from the fixed one."""
        own = max((v.coefficient for v in self.plan.vectors), key=abs)
        return {"coefficient": own * math.exp(at.log_scale), "spread": self._spread(at.weights)}

    def measure(self, at: Strengths) -> Measured:
        """Effect and damage there, each with its derivatives.

        Cost: a forward and a backward pass over prompts and texts; a further forward pass over the
        prompts where one has several completions on a side.
        """
        plan = self.plan_at(at)
        with self.host.frozen():
            effect = self._slopes(plan, at, self._odds(plan))
            damage = self._slopes(plan, at, self._damage())
        effect = replace(effect, value=effect.value - self._unsteered)
        if self.unit == "nll":
            damage = replace(damage, value=damage.value - self._texts.nll)
        return Measured(effect, damage)

    def moved(self, at: Strengths, here: Measured, allowed: float, step_size: float) -> Strengths:
        """One step: the strengths towards more effect at equal damage, by `step_size` (root mean
        square over tokens); the whole towards the damage that is allowed.

        What a change of strengths costs is charged at the rate at which the coefficient buys
        effect with damage; where it buys none, nothing is charged."""
        effect, damage = here.effect, here.damage
        has_price = damage.log_scale > 0
        rate = max(0.0, effect.log_scale / damage.log_scale) if has_price else 0.0
        ascents = [e - rate * d for e, d in zip(effect.weights, damage.weights, strict=True)]
        ways = [
            torch.linalg.solve(cov + cov.diagonal().median() * torch.eye(len(g)).to(cov), g)
            for g, cov in zip(ascents, self._covariances, strict=True)
        ]
        size = self._spread(ways)
        if size == 0:
            return at
        changes = [step_size / size * way for way in ways]
        weights = tuple(w + change for w, change in zip(at.weights, changes, strict=True))
        if not has_price:
            return Strengths(weights, at.log_scale)
        more = sum(float(d @ c) for d, c in zip(damage.weights, changes, strict=True))
        move = (allowed - damage.value - more) / damage.log_scale
        return Strengths(weights, at.log_scale + min(max(move, -LARGEST_MOVE), LARGEST_MOVE))

    # -- derivatives ------------------------------------------------------------------------------

    def _slopes(self, plan: SteeringPlan, at: Strengths, parts: _Parts) -> Slopes:
        """A sum of parts, each with a graph of its own, that is let go before the next is made."""
        leaves = [w.float().requires_grad_(True) for w in at.weights]
        scale = torch.ones((), requires_grad=True)
        edits = plan.prepared(centred=self._centred)
        totals = [torch.zeros_like(w) for w in at.weights]
        value = slope = 0.0
        makers = iter(parts(edits, plan))
        while True:
            with torch.enable_grad():
                for edit, w, mean in zip(edits, leaves, self._means, strict=True):
                    bias = 1.0 - mean.float() @ w
                    edit.live = {"weights": scale * w, "bias": scale * bias}
                part = next(makers, None)
            if part is None:
                return Slopes(value, tuple(totals), slope)
            value += float(part.detach())
            *by_weights, by_scale = torch.autograd.grad(part, [*leaves, scale], allow_unused=True)
            for total, grad in zip(totals, by_weights, strict=True):
                total += 0 if grad is None else grad.double().cpu()
            slope += 0.0 if by_scale is None else float(by_scale)

    def _odds(self, plan: SteeringPlan) -> _Parts:
        """Parts whose sum has the value and the derivatives of the mean log-odds."""
        prompts, n = self._prompts, self._n_prompts
        signs = torch.where(prompts.positive, 1.0, -1.0).double()
        shares, odds = torch.ones_like(signs), 0.0
        if not self._one_each:
            # d log-odds / d log p of a completion: its share of its side's probability.
            scores = prompts.scores(plan)
            odds = float(scores.log_odds().mean())
            for good in (True, False):
                for i in range(n):
                    mine = (prompts.owner == i) & (prompts.positive == good)
                    shares[mine] = scores.total[mine].softmax(0)
            odds -= float((signs * shares * scores.total).sum()) / n

        def parts(edits: Sequence[VectorEdit], plan: SteeringPlan) -> Iterator[Tensor]:
            for k, batch in enumerate(prompts.batches):
                totals = prompts.totals(batch, plan, edits)
                value = (signs * shares)[batch.index] @ totals / n
                yield value + odds if k == 0 else value

        return parts

    def _damage(self) -> _Parts:
        texts, kl = self._texts, self.unit == "kl"

        def parts(edits: Sequence[VectorEdit], plan: SteeringPlan) -> Iterator[Tensor]:
            for nll, divergence in texts.sums(plan, kl=kl, vector_edits=edits):
                yield divergence / texts.n_positions if kl else nll / max(1, texts.n_tokens)

        return parts

    # -- the states that the strengths are measured on --------------------------------------------

    def _read_states(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and covariance of the states that each vector edits, at the fixed strength."""
        plan = self.plan
        readers = [_Reader(edit) for edit in plan.prepared(centred=self._centred)]
        for batch in self._prompts.batches:
            self._prompts.totals(batch, plan, readers)
        for _ in self._texts.sums(plan, kl=False, vector_edits=readers):
            pass
        for reader in readers:
            if reader.moments.n < 2:
                raise DataError(
                    f"plan: its vector at {reader.hook_name!r} edits {reader.moments.n} tokens of "
                    "the training prompts and texts (is its gate closed, or positions too narrow?),"
                    " so there is no strength to learn; give prompts that it steers."
                )
        results = [reader.moments.result() for reader in readers]
        return (
            [m.means["x"] for m in results],
            [m.covariances["x", "x"] for m in results],
        )

    def _spread(self, weights: Iterable[Tensor]) -> float:
        """Root mean square over tokens of the part of the strength that depends on them."""
        pairs = list(zip(weights, self._covariances, strict=True))
        return math.sqrt(sum(max(0.0, float(w @ cov @ w)) for w, cov in pairs) / len(pairs))


class _Reader(VectorEdit):
    """An edit that adds what it edits to moments."""

    def __init__(self, edit: VectorEdit) -> None:
        vars(self).update(vars(edit))
        self._in_basis = centre if self._centred else wide
        self.moments = RunningMoments({"x": self._direction.shape[0]}, [("x", "x")])

    def __call__(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """The edited activations."""
        states = self._in_basis(wide(x))
        edited = states.flatten(0, 1) if mask is None else states[mask.to(x.device)]
        self.moments.update({"x": edited.cpu()})
        return super().__call__(x, mask, rows)
