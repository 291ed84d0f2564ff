"""Gradient checkpointing: parts of a pass that are run once more in its backward pass.

Which tokens are edited there belongs to the pass that is repeated, not to the latest one. torch
keeps one frame for each checkpointed part, in its forward run and in every repetition, so what was
edited is kept by frame."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from expertsteer_lens.errors import InterventionError

_NOT_SAYING = (
    "gradient checkpointing with use_reentrant=True runs a part of the pass again without saying "
    "of which pass; use use_reentrant=False (in transformers: gradient_checkpointing_enable("
    'gradient_checkpointing_kwargs={"use_reentrant": False})), or switch checkpointing off.'
)


class Repeated:
    """What a plan did in each checkpointed part of the passes that it steered."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def run(
        self,
        fn: Callable[[Tensor], Tensor | None],
        x: Tensor,
        *,
        now: Any,
        switch: Callable[[Any], Any],
        is_on: Callable[[], bool] | None,
    ) -> Tensor | None:
        """Call the function of a hook point.

        Args:
            fn: the function.
            x: the activation.
            now: what is known of the pass that is running.
            switch: makes something else known, and returns what was.
            is_on: whether the plan is still at work; None: nobody knows.

        Raises:
            InterventionError: the part is run again in a way that does not say of which pass it is,
                or perhaps after the plan has ended.
        """
        if torch.compiler.is_compiling():
            return fn(x)
        frame, again = _frame()
        if frame is None:
            if _in_backward():
                raise InterventionError(_NOT_SAYING)
            check_reentrant()
            return fn(x)
        if again:
            if frame not in self._known:
                return None  # a pass of before the plan was on
            before = switch(self._known[frame])
            try:
                return fn(x)
            finally:
                switch(before)
        if is_on is None:
            raise InterventionError(
                "gradient checkpointing runs a part of the pass again in the backward pass, when "
                "these functions may be gone; use `with plan.hooks(model):` around both passes."
            )
        if frame not in self._known:
            _refuse_later(frame, is_on)
        self._known[frame] = now
        return fn(x)


def _refuse_later(frame: Any, is_on: Callable[[], bool]) -> None:
    """Let the part be run again only while the plan is on."""
    run = frame.recompute_fn

    def checked(*args: Any, **kwargs: Any) -> Any:
        if not is_on():
            raise InterventionError(
                "the backward pass of a steered pass runs parts of it again (gradient "
                "checkpointing), and the steering has ended: they would run unsteered, and the "
                "gradients be wrong; call backward() inside the block, or switch checkpointing off."
            )
        return run(*args, **kwargs)

    frame.recompute_fn = checked


def check_reentrant() -> None:
    """Raise `InterventionError` in the forward run of a reentrant checkpoint (gradients are off in
    it), before the first token is edited: its second run may come after the plan has ended."""
    if torch.is_grad_enabled():
        return
    code, frame = checkpoint.CheckpointFunction.forward.__code__, sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            raise InterventionError(_NOT_SAYING)
        frame = frame.f_back  # type: ignore[assignment]


def _frame() -> tuple[Any, bool]:
    """The checkpointed part that is running, and whether it is run again; (None, False) outside."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack: Any = None if hooks is None else hooks[0]
    if getattr(pack, "__module__", None) != checkpoint.__name__:
        return None, False
    inside = getattr(pack, "__wrapped__", pack)
    cells = dict(zip(inside.__code__.co_freevars, inside.__closure__ or (), strict=True))
    if "target_frame_ref" in cells:
        return cells["target_frame_ref"].cell_contents(), True
    if "frame" in cells:
        return cells["frame"].cell_contents, False
    raise InterventionError(
        f"gradient checkpointing of torch {torch.__version__} does not say which part of which "
        "pass it runs again; switch checkpointing off."
    )


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
