"""What is done to an activation, on which tokens, under which condition; no model is known here."""

from __future__ import annotations

from . import edits
from .edits import EDITS, Edit, register_edit
from .gates import Gate, fit_gate

__all__ = ["EDITS", "Edit", "Gate", "edits", "fit_gate", "register_edit"]
