"""Errors a caller may want to catch.

Every message says which argument, what was expected, what arrived, and what to do. Argument errors
are also `ValueError`, `KeyError` or `TypeError`, so plain `except` clauses keep working."""

from __future__ import annotations


class ExpertSteerError(Exception):
    """Base of every error this package raises on its own account."""

    # A value of the class: nnsight sends classes by value, where names of this module are unknown.
    longest = 4000
    """Characters of a message; of a longer one the middle is left out (`args` has all of it)."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; our messages are sentences. What a file holds may
        # stand in them, so that they have a longest length.
        text = str(self.args[0]) if self.args else ""
        if len(text) <= self.longest:
            return text
        half = self.longest // 2
        return f"{text[:half]} … {text[-half:]}"


class ArgumentError(ExpertSteerError, ValueError):
    """An argument or a configuration field has a value that cannot be used."""


class DataError(ExpertSteerError, ValueError):
    """Texts, labels or activations are unusable: empty, not finite, unequal in number, one class
    only."""


class HookNameError(ExpertSteerError, KeyError):
    """A hook name does not exist on the model, or cannot be used for what was asked."""


class WidthError(ExpertSteerError, ValueError):
    """Two tensors that must share a width do not."""


class SolveError(ExpertSteerError, ValueError):
    """A linear system could not be solved at the settings given; nothing was changed to make it
    solvable."""


class HostError(ExpertSteerError, TypeError):
    """The object given is not a model this package can read and steer, or the host cannot do what
    was asked."""


class ModelStateError(ExpertSteerError, RuntimeError):
    """The model is in a state in which results would be wrong, e.g. training mode or vanished
    hooks."""


class InterventionError(ExpertSteerError, RuntimeError):
    """An intervention did not act where it should have: a hook never fired, or was removed by
    someone else."""


class ArtifactError(ExpertSteerError, ValueError):
    """A saved file is damaged, of another format version, or was fitted on another model."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a long computation; what was finished is kept.

    A `KeyboardInterrupt`, so that it stops a program that does not look for it.

    Args:
        message: what was finished, and how to go on.
        finished: what was finished; the function that was stopped takes it as `finished=`.
    """

    def __init__(self, message: str, finished: object) -> None:
        super().__init__(message)
        self.finished = finished
