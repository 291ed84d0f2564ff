"""What goes in: texts, conversations, labelled pairs, behaviours, and the activations read from
them."""

from __future__ import annotations

from .activations import ActivationStore
from .behaviour import Behaviour
from .chat import Chat, Text
from .contrast import ContrastPairs

__all__ = ["ActivationStore", "Behaviour", "Chat", "ContrastPairs", "Text"]
