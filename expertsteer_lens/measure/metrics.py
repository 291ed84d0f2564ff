"""Everything that measures what steering does to a model, in nats.

| wanted | function |
|---|---|
| one number a prompt: log odds of the wanted completions | `behaviour_metric` |
| ... and whether the likeliest completion is a wanted one | `behaviour_and_accuracy` (one pass) |
| the latter alone | `choice_accuracy` |
| which way to push, at every layer | `behaviour_gradient`, `readout_gradient` |
| what a plan costs on neutral texts, plan after plan | `NeutralTexts` |
| likelihood of neutral texts, text by text | `neutral_nll` |

All functions take a `Host` (see `expertsteer_lens.hosts`) and an optional plan, which is installed
for each batch and told where its prompts end."""

from __future__ import annotations

from .completions import (
    behaviour_and_accuracy,
    behaviour_metric,
    choice_accuracy,
    default_batch,
    repeated_trigrams,
)
from .gradients import behaviour_gradient, readout_gradient
from .neutral import NeutralTexts, neutral_nll

__all__ = [
    "NeutralTexts",
    "behaviour_and_accuracy",
    "behaviour_gradient",
    "behaviour_metric",
    "choice_accuracy",
    "default_batch",
    "neutral_nll",
    "readout_gradient",
    "repeated_trigrams",
]
