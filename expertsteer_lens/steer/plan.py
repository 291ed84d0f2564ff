"""Steering plans: frozen data that says what is written where, on which tokens, how strongly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from expertsteer_lens._checks import check_number, shown
from expertsteer_lens._html import repr_html
from expertsteer_lens._upward import upward
from expertsteer_lens.data.activations import ActivationStore, layer_or_none
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError
from expertsteer_lens.hosts import Host, as_host
from expertsteer_lens.interventions.arithmetic import Basis, centre
from expertsteer_lens.interventions.edits import EDITS as EDITS
from expertsteer_lens.interventions.edits import EditName
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.interventions.parameters import shown_parameters
from expertsteer_lens.interventions.positions import Positions, check_positions
from expertsteer_lens.interventions.vector_edit import VectorEdit

from . import bake as baking
from . import nnsight_edit
from .attached import SteeringHandle
from .foreign import ForeignName, Rows, plan_from_foreign
from .report import RunReport
from .run import PlanRun
from .vector import RelativeTo, SteeringVector


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """Several steering vectors with the tokens they act on. Vectors at one hook point are applied
    in the order given.

    Example:
        >>> vectors = {"blocks.1.hook_resid_post": torch.tensor([3.0, 4.0])}
        >>> plan = SteeringPlan.from_vectors(
        ...     vectors, coefficient=0.5, median_norms={"blocks.1.hook_resid_post": 8.0}
        ... )
        >>> plan.with_positions("generated")
        SteeringPlan(positions='generated', basis=None, for any model,
          blocks.1.hook_resid_post: add +0.5×8 (median norm), d=2)
        >>> plan.vectors[0].delta
        tensor([2.4000, 3.2000])
    """

    vectors: tuple[SteeringVector, ...]
    positions: Positions = "all"
    """Absolute token positions, see `expertsteer_lens.interventions.positions`."""
    basis: Basis | None = None
    """Coordinates of the directions and norms: "centred", "raw", or None: whatever the model's is
    found to be."""
    target: Mapping[str, Any] = field(default_factory=dict)
    """The model it was made for: fingerprint, name, d_model, n_layers. Checked where given."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts about how it was made."""
    _last: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        vectors = tuple(self.vectors)
        if not vectors or not all(isinstance(v, SteeringVector) for v in vectors):
            raise ArgumentError(
                "vectors must hold at least one SteeringVector; SteeringPlan.from_vectors takes "
                "tensors."
            )
        if self.basis not in (None, *get_args(Basis)):
            raise ArgumentError(f"basis must be 'raw', 'centred' or None, got {self.basis!r}.")
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "positions", check_positions(self.positions))
        object.__setattr__(self, "target", dict(self.target))
        object.__setattr__(self, "provenance", dict(self.provenance))

    @classmethod
    def from_vectors(
        cls,
        vectors: Mapping[str, Tensor],
        *,
        coefficient: float | Mapping[str, float] = 1.0,
        relative_to: RelativeTo = "median_norm",
        median_norms: ActivationStore | Mapping[str, float] | None = None,
        positions: Positions = "all",
        edit: EditName | str = "add",
        preserve_norm: bool = False,
        gate: Gate | None = None,
        basis: Basis | None = None,
        parameters: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> SteeringPlan:
        """A plan from one tensor `[d]` per hook name, of any length: only its direction is used.

        Args:
            vectors: tensor by hook name.
            coefficient: strength, one for all or one per hook name. To add a tensor as it is, pass
                `relative_to="unit"` and its norm.
            relative_to: "median_norm" (needs `median_norms`) or "unit".
            median_norms: number by hook name, or activations of neutral texts from `capture`, which
                also say basis and target.
            positions: see `expertsteer_lens.interventions.positions`.
            edit: see `SteeringVector`.
            preserve_norm: see `SteeringVector`.
            gate: one for every vector; see `Gate`.
            basis: see `SteeringPlan`; default: that of `median_norms`, if it says.
            parameters: by hook name, what the edit asks for besides; see `SteeringVector`.

        Raises:
            ArgumentError: missing norms, zero vectors, bad choices.
            DataError: NaN or Inf, wrong shape.
        """
        if not vectors:
            raise ArgumentError("vectors is empty; give at least one tensor by hook name.")
        out = []
        for name, value in vectors.items():
            try:
                tensor = torch.as_tensor(value).detach().to(torch.float64)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"vectors[{name!r}] must be a tensor [d] of numbers, got {shown(value)}."
                ) from error
            if tensor.ndim != 1 or not bool(torch.isfinite(tensor).all()):
                raise DataError(
                    f"vectors[{name!r}] must be a finite tensor [d], got shape "
                    f"{tuple(tensor.shape)}."
                )
            if not bool(tensor.any()):
                raise ArgumentError(f"vectors[{name!r}] is zero and has no direction.")
            out.append(
                SteeringVector(
                    hook_name=name,
                    direction=(tensor / tensor.norm()).float(),
                    coefficient=_lookup("coefficient", coefficient, name),
                    relative_to=relative_to,
                    median_norm=_norm_of(median_norms, name)
                    if relative_to == "median_norm"
                    else None,
                    edit=edit,
                    preserve_norm=preserve_norm,
                    gate=gate,
                    parameters={} if parameters is None else parameters.get(name, {}),
                )
            )
        facts = dict(median_norms.provenance) if isinstance(median_norms, ActivationStore) else {}
        keys = ("fingerprint", "name", "d_model", "n_layers")
        return cls(
            vectors=tuple(out),
            positions=positions,
            basis=basis if basis is not None else facts.get("basis"),
            target={k: facts[k] for k in keys if k in facts},
        )

    @classmethod
    def from_foreign(
        cls,
        source: Any,
        *,
        format: ForeignName | str | None = None,
        layers: Sequence[int] | None = None,
        coefficient: float = 1.0,
        rows: Rows = "blocks",
        median_norms: ActivationStore | Mapping[str, float] | None = None,
        positions: Positions = "all",
    ) -> SteeringPlan:
        """Other people's vectors as a plan, to be steered with, evaluated and compared like ours.

        | format | source |
        |---|---|
        | gguf | control vector of repeng or llama.cpp: `direction.N` is added after block N |
        | lm_eval | `.pt` of lm-evaluation-harness `steered`, action "add" |
        | steering_vectors, repeng | the `SteeringVector` or `ControlVector` itself |
        | tensors | `{layer: [d]}` or `{hook_name: [d]}`, also as `.pt` or `.safetensors` |
        | matrix | `[n_layers, d]` (hotwire and others), row i is added after block i |

        Args:
            source: a path (str or `Path`), or an object.
            format: default: told by the content.
            layers: take these alone, 0-based; default: all that are not 0.
            coefficient: multiplies the vectors as they are; 1 is the strength they came with.
            rows: of a matrix: "blocks", or "hidden_states" as transformers counts them,
                `[n_layers + 1, d]`: row i + 1 is block i; the first row (embeddings) and the last
                (after the final norm) are no output of a block and are left out.
            median_norms: see `from_vectors`; the strength stays what it is and is expressed in
                this unit, which calibration uses.
            positions: see `expertsteer_lens.interventions.positions`.

        Raises:
            ArgumentError: no such file, an unknown format, or what a plan cannot say ("clamp" of
                the harness, single heads, norms).
            ArtifactError: the file is damaged, or holds Python objects (pickle).
            DataError: NaN, Inf, or a wrong shape.

        Example:
            >>> SteeringPlan.from_foreign({3: torch.tensor([3.0, 4.0])}, coefficient=2.0).vectors
            (blocks.3.hook_resid_post: add +10, d=2,)
        """
        return plan_from_foreign(
            source,
            format=format,
            layers=layers,
            coefficient=coefficient,
            rows=rows,
            median_norms=median_norms,
            positions=positions,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> SteeringPlan:
        """A saved plan, from a folder or the hub; `expertsteer_lens.load`, for plans alone.

        Raises:
            ArtifactError: see `load`; or what is there is no plan.
        """
        plan = upward("load")(
            path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not isinstance(plan, cls):
            raise ArtifactError(f"{path} holds a saved {type(plan).__name__}, no plan; see `load`.")
        return plan

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        evaluation: Any = None,
    ) -> str:
        """Upload the plan; see `expertsteer_lens.push_to_hub`."""
        where: str = upward("push_to_hub")(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            evaluation=evaluation,
        )
        return where

    def prepared(self, *, centred: bool) -> list[VectorEdit]:
        """What each vector does, see `SteeringVector.prepared`."""
        return [vector.prepared(centred=centred) for vector in self.vectors]

    @property
    def hook_names_read(self) -> list[str]:
        """Every hook point the plan acts at or a gate of it reads."""
        gates = [v.gate.hook_name for v in self.vectors if v.gate is not None and v.gate.hook_name]
        return [*(v.hook_name for v in self.vectors), *gates]

    # -- variations -------------------------------------------------------------------------------

    def with_coefficient(self, coefficient: float) -> SteeringPlan:
        """The same plan with its largest coefficient (by size) set to `coefficient`; the others
        keep their ratio to it."""
        check_number("coefficient", coefficient)
        largest = max((v.coefficient for v in self.vectors), key=abs)
        ratio = [v.coefficient / largest if largest else 1.0 for v in self.vectors]
        vectors = (
            replace(v, coefficient=coefficient * r)
            for v, r in zip(self.vectors, ratio, strict=True)
        )
        return replace(self, vectors=tuple(vectors))

    def with_positions(self, positions: Positions) -> SteeringPlan:
        """The same plan on other tokens."""
        return replace(self, positions=positions)

    def with_random_directions(self, *, seed: int) -> SteeringPlan:
        """The control: the same hook points, strengths and positions with random unit directions
        (mean-free if centred)."""
        # Hashed: a generator seeded with `seed` itself may be the very one the caller's direction
        # was drawn from.
        digest = hashlib.sha256(f"random directions {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        vectors = []
        for vector in self.vectors:
            noise = torch.randn(vector.direction.shape[0], generator=generator)
            noise = centre(noise) if self.basis == "centred" else noise
            facts = {**vector.provenance, "direction": "random", "seed": seed}
            vectors.append(replace(vector, direction=noise / noise.norm(), provenance=facts))
        return replace(
            self,
            vectors=tuple(vectors),
            provenance={**self.provenance, "directions": f"random, seed {seed}"},
        )

    # -- use --------------------------------------------------------------------------------------

    def hooks(
        self,
        model: Any,
        *,
        allow_mismatch: bool = False,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        row_coefficients: Sequence[float] | Tensor | None = None,
    ) -> AbstractContextManager[RunReport]:
        """Steer `model` inside the block: every forward pass and every generate call, on any host.

        The block belongs to the thread (or asyncio task) that opens it, and to threads started in
        it. Other threads run the model unsteered meanwhile, or with plans of their own.

        Args:
            model: the target, any model `as_host` accepts.
            allow_mismatch: use the plan on a model other than the one it was made for.
            prompt_lengths: tokens (BOS included) of each row that are prompt. By default the prompt
                is what the first pass of a generate call, or a lone forward pass, is given; say it
                when scoring a completion that is already in the tokens.
            row_coefficients: multiplies every coefficient, row by row of the batch; rows with 0 are
                left bit for bit.

        Yields:
            A report that counts passes and edited tokens; also `last_run` afterwards.

        Raises:
            HookNameError, WidthError, ArtifactError, ModelStateError: on entry, before anything is
                changed.
            InterventionError: on leaving without another error, if the model was never run inside
                the block, a hook never fired or was removed by someone else (`reset_hooks`), or no
                token was ever selected by `positions`. For an open end use `attach`.
        """
        return self._start(model, allow_mismatch, prompt_lengths, row_coefficients).run()

    def attach(self, model: Any, *, allow_mismatch: bool = False) -> SteeringHandle:
        """Steer `model`, in every thread, until `.remove()` is called on the handle returned.
        Nothing is checked at the end. Where some requests of a server are steered and others not,
        open `hooks` in the thread of each steered request instead.

        The model owns the steering, as it owns torch hooks: it goes on if the handle is dropped,
        until `expertsteer_lens.steer.detach(model)`, and is gone with the model.

        If somebody removes the hooks meanwhile (`reset_hooks`), the next pass of the model is an
        `InterventionError`, before its first block, until `.remove()`."""
        return SteeringHandle(self._start(model, allow_mismatch, everywhere=True))

    def fwd_hooks(
        self,
        model: Any,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        allow_mismatch: bool = False,
    ) -> list[tuple[str, Callable[..., Tensor | None]]]:
        """A plain list of (hook name, function) for TransformerLens' `run_with_hooks` and `hooks`.

        A bare list sees activations only: a single-token pass after a longer one counts as a cached
        step, every other pass as a new sequence whose prompt is all of it (or `prompt_lengths`).
        For padded batches pass the `attention_mask` that the model gets. For uncached generation
        use `hooks`, which sees the generate call itself."""
        run = self._start(model, allow_mismatch, prompt_lengths)
        return run.listed_functions(attention_mask)

    def apply(
        self,
        model: Any,
        *,
        allow_mismatch: bool = False,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        row_coefficients: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Steer the nnsight run that is open: call it once, first thing in the body of `trace`,
        `generate` or `invoke`.

        Every pass of the run is steered (all steps of a `generate`, no loop needed; in an `invoke`
        its own rows), and whatever the body reads is steered, the `.output` of the steered layer
        too. Checked at the end like `hooks`. For traces that run on a server use `edit`.

        Raises:
            HostError: outside of a trace, or on another host; use `hooks` there.
            InterventionError: called after the model began to run, or in a loop over later steps.
        """

        def start(host: Host) -> PlanRun:
            return self._start(host, allow_mismatch, prompt_lengths, row_coefficients)

        nnsight_edit.apply_plan(self, as_host(model), start)

    def edit(
        self,
        model: Any,
        *,
        allow_mismatch: bool = False,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
    ) -> Any:
        """Make the plan a default edit of an nnsight model; it steers every later run until
        `.remove()` on the handle.

        It travels with the model: `remote=True` runs are steered on the server, which needs nothing
        of this package. Gates and reports are for `hooks`, `attach` and `apply`."""
        return nnsight_edit.edit_plan(
            self, as_host(model), allow_mismatch=allow_mismatch, prompt_lengths=prompt_lengths
        )

    def bake(self, model: Any, *, allow_mismatch: bool = False) -> Any:
        """A copy of a Hugging Face model with the plan in its weights: no hooks, so it compiles,
        serves and batches like any other, and is saved and loaded by plain transformers.

        For plans that add vectors at every token, without gate. The vector becomes a bias of the
        steered block; where the model's class has none, an additional block behind it adds the
        vector and nothing else. `model.config.expertsteer_lens` of the copy says where. It takes
        the memory of a second model; in half precision the vector is rounded to the weights' type.

        Args:
            model: the target, a causal model of transformers in full weights.
            allow_mismatch: see `hooks`.

        Raises:
            ArgumentError: the plan adds nothing, or not the same vector at every token.
            HostError: the model is none of transformers', quantised, offloaded or with an adapter;
                or its class has no place for the vector; or the copy, run on fixed tokens, does not
                say what the steered model says.

        Example:
            >>> from expertsteer_lens import zoo
            >>> model = zoo.load("target", host="huggingface")
            >>> vectors = {"blocks.1.hook_resid_post": torch.ones(model.config.hidden_size)}
            >>> plan = SteeringPlan.from_vectors(vectors, coefficient=3.0, relative_to="unit")
            >>> plan.bake(model).config.expertsteer_lens["baked"][0]["parameter"]
            'model.layers.1.mlp.down_proj.bias'
        """
        return baking.bake(self, model, allow_mismatch=allow_mismatch)

    def _start(
        self,
        model: Any,
        allow_mismatch: bool,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        row_coefficients: Sequence[float] | Tensor | None = None,
        everywhere: bool = False,
    ) -> PlanRun:
        return PlanRun(
            self,
            as_host(model),
            allow_mismatch=allow_mismatch,
            prompt_lengths=prompt_lengths,
            row_coefficients=row_coefficients,
            everywhere=everywhere,
        )

    @property
    def last_run(self) -> RunReport | None:
        """What the latest `hooks`, `attach` or `fwd_hooks` of this plan has done so far; None
        before the first."""
        return self._last[-1] if self._last else None

    def to_pandas(self) -> Any:
        """One row per vector."""
        import pandas as pd

        names = ("hook_name", "edit", "coefficient", "relative_to", "median_norm", "preserve_norm")
        rows = []
        for v in self.vectors:
            rows.append(
                {
                    **{n: getattr(v, n) for n in names},
                    "layer": layer_or_none(v.hook_name),
                    "scale": v.scale,
                    "gate": str(v.gate or ""),
                    "parameters": shown_parameters(v.parameters),
                }
            )
        return pd.DataFrame(rows)

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        lines = "\n".join(f"  {v!r}" for v in self.vectors)
        made_for = self.target.get("name", "any model")
        rules = f"positions={self.positions!r}, basis={self.basis}"
        return f"SteeringPlan({rules}, for {made_for},\n{lines})"


def _lookup(argument: str, value: float | Mapping[str, float], name: str) -> float:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ArgumentError(f"{argument} has no entry for {name!r}; it has {sorted(value)}.")
    return value[name]


def _norm_of(norms: ActivationStore | Mapping[str, float] | None, name: str) -> float:
    if norms is None:
        raise ArgumentError(
            "relative_to='median_norm' needs median_norms: a number per hook name, or activations "
            "of neutral texts from "
            "capture(...); or pass relative_to='unit'."
        )
    return (
        norms.median_norm(name)
        if isinstance(norms, ActivationStore)
        else _lookup("median_norms", norms, name)
    )
