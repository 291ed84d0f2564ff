"""Models compiled by torch: what was compiled before a hook was put on knows nothing of it, so such
code is not used while hooks of ours are on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from .scope import CHANGING_HOOKS

_n_eager = 0
_stance: Any = None


def uncompiled(model: Any) -> Any:
    """The model inside `torch.compile(model)`; any other object as it is."""
    while isinstance(model, nn.Module) and isinstance(model._modules.get("_orig_mod"), nn.Module):
        model = model._modules["_orig_mod"]
    return model


@contextmanager
def eager_where_compiled(model: nn.Module) -> Iterator[None]:
    """Inside, compiled code is passed by, for all of torch, if any was compiled that may hold this
    model; nothing happens otherwise, and what is compiled inside holds the hooks.

    `torch.compile` does not look whether hooks were added later, and the compiled code would run
    on without them."""
    global _n_eager, _stance
    if not _may_be_compiled(model):
        yield
        return
    with CHANGING_HOOKS:
        if _n_eager == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _n_eager += 1
    try:
        yield
    finally:
        with CHANGING_HOOKS:
            _n_eager -= 1
            if _n_eager == 0:
                _stance.__exit__(None, None, None)
                _stance = None


def _may_be_compiled(model: nn.Module) -> bool:
    """Whether torch has compiled a method of the model's modules, or a function outside of torch
    and transformers, which may call the model."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None:
        return False
    codes = [ref() for ref in frames.input_codes.seen]
    if not codes:
        return False  # looking through the modules takes milliseconds, at every pass
    own = {_code_of(type(m).forward) for m in model.modules()}
    own |= {_code_of(getattr(nn.Module, n)) for n in ("_call_impl", "_wrapped_call_impl")}
    return any(code in own or not _is_of_a_library(code) for code in codes if code is not None)


def _code_of(function: Any) -> CodeType | None:
    function = getattr(function, "__func__", function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__code__", None)


def _is_of_a_library(code: CodeType) -> bool:
    transformers = sys.modules.get("transformers")
    folders = [Path(torch.__file__).parent]
    if transformers is not None and transformers.__file__ is not None:
        folders.append(Path(transformers.__file__).parent)
    return any(code.co_filename.startswith(f"{folder}{os.sep}") for folder in folders)
