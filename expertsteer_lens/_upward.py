"""The few things that a class offers although a higher floor does them: a result draws itself, a
plan goes to the hub. They are looked up by name when they are called, so no floor imports from
above, and this is all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

DRAWS = "results draw themselves: `.plot()`"
HUB = "a plan has `from_pretrained` and `push_to_hub`, as hub users expect"
UPWARD = {
    "plot_layer_pair_mi": ("show.plots", DRAWS),
    "plot_layer_pairs": ("show.plots", DRAWS),
    "plot_dose_response": ("show.plots", DRAWS),
    "plot_evaluation": ("show.plots", DRAWS),
    "plot_placement": ("show.step_plots", DRAWS),
    "load": ("files.io", HUB),
    "push_to_hub": ("files.io", HUB),
}
"""Function: the module it is in, and why somebody below calls it."""


def upward(name: str) -> Callable[..., Any]:
    """A function of `UPWARD`.

    Example:
        >>> upward("push_to_hub").__module__
        'expertsteer_lens.files.io'
    """
    module = importlib.import_module(f"expertsteer_lens.{UPWARD[name][0]}")
    function: Callable[..., Any] = getattr(module, name)
    return function
