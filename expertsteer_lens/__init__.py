"""Steer a target language model with directions taught by an external expert model.

Importing this package imports no host (transformer_lens, nnsight, transformers); a host is imported
when a model of it is used. What can be imported from here is listed once, in `__init__.pyi`, which
type checkers read too; each name is looked up when it is first used. Here are the names that a
script begins with; the types of results, and what fewer need, are in the folders (`esl.steer`,
`esl.hosts`, ...).
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from . import _moved

# Not lazy: nnsight mounts a method `save` on every object, modules included, so a lazy `save` would
# never be looked up.
from .files.io import load as load
from .files.io import push_to_hub as push_to_hub
from .files.io import save as save

__version__ = "0.1.0"

_FOLDERS = ("align", "data", "evaluation", "files", "hosts", "interventions")
_FOLDERS += ("learn", "measure", "pair", "pipeline", "show", "steer")
_lazy, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", "load", "push_to_hub", "save"]
__all__ += sorted(set(_names) - {*__all__, *_FOLDERS, *_moved.IN_FOLDERS})
_moved.install()


def __getattr__(name: str) -> Any:
    if name in _moved.NAMES:
        return _moved.lookup(name)
    try:
        return _lazy(name)
    except AttributeError:
        if name in _names:
            raise
        known = ", ".join(__all__)
        raise AttributeError(
            f"module 'expertsteer_lens' has no attribute {name!r}; it has {known}"
        ) from None


def __dir__() -> list[str]:
    return list(__all__)
