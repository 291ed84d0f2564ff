"""The README of what is saved: front matter for the hub, figures, verdict, and how to use it.

Names in it come from files and models of others, so they are cut to plain text.
"""

from __future__ import annotations

import math
import re
import shlex
from typing import TYPE_CHECKING, Any

from .plan_file import SIGN_CONVENTION

if TYPE_CHECKING:
    from expertsteer_lens.evaluation.result import Evaluation
    from expertsteer_lens.steer.plan import SteeringPlan

WHERE = "this folder or hub id"
"""What a card calls the place it lies in until that is known."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def plan_card(plan: SteeringPlan, evaluation: Evaluation | None = None) -> str:
    """The README of a saved plan, with the verdict and table of an evaluation if there is one."""
    target, expert = plan.target or {}, plan.provenance.get("expert") or {}
    rows = "\n".join(
        f"| `{plain(v.hook_name)}` | {plain(v.edit)} | {v.coefficient:g} | {v.relative_to} | "
        f"{'' if v.median_norm is None else f'{v.median_norm:.4g}'} |"
        for v in plan.vectors
    )
    return f"""{_front_matter(target.get("name"))}
# Steering plan for {plain(target.get("name", "an unnamed model"))}

Directions taught by {plain(expert.get("name", "the caller"))}.
{SIGN_CONVENTION[0].upper() + SIGN_CONVENTION[1:]}.

| hook point | edit | coefficient | unit | median norm |
|---|---|---|---|---|
{rows}

Positions: `{plain(plan.positions)}`. Residual basis: `{plan.basis}`.
Target fingerprint: `{plain(target.get("fingerprint"))}`.
{_quality(plan)}{_evaluated(evaluation)}
## Use

```python
import expertsteer_lens as esl

plan = esl.load("{WHERE}")
with plan.hooks(model):
    ...
```

{_reproduce(plan)}All settings, seeds, hashes of the data and the calibration curve are in
`config.json`.
"""


def result_card(thing: Any) -> str:
    """The README of any other result."""
    return f"""{_front_matter(None)}
# {type(thing).__name__}

```
{plain(repr(thing), lines=True)}
```

```python
import expertsteer_lens as esl

result = esl.load("{WHERE}")
```
"""


def located(card: str, repo_id: str) -> str:
    """The card of a thing that lies at `repo_id` on the hub."""
    return card.replace(WHERE, repo_id)


def plain(value: Any, *, lines: bool = False) -> str:
    """Text without control characters, tags, table bars and code marks, cut to a length."""
    kept = "\n" if lines else ""
    text = "".join(c if c.isprintable() or c in kept else " " for c in str(value))
    text = text.replace("<", "‹").replace(">", "›").replace("`", "'")
    return (text if lines else text.replace("|", "/"))[: 4000 if lines else 200]


def _front_matter(target: Any) -> str:
    base = f"base_model: {target}\n" if _HUB_ID.fullmatch(str(target)) else ""
    return f"""---
library_name: expertsteer-lens
{base}tags:
- activation-steering
- expertsteer
---
"""


def _quality(plan: SteeringPlan) -> str:
    """What the fit says of each direction."""
    rows = []
    for v in plan.vectors:
        facts = dict(v.provenance)
        aligner = facts.get("aligner")
        r2 = aligner.get("r2") if isinstance(aligner, dict) else None
        figures = (facts.get("mutual_information"), r2, facts.get("rfm_validation_auc"))
        if any(figure is not None for figure in figures):
            read = plain(facts.get("expert_hook_name", ""))
            rows.append(
                f"| `{read}` | `{plain(v.hook_name)}` | {' | '.join(map(_number, figures))} |"
            )
    if not rows:
        return ""
    table = "\n".join(rows)
    return f"""
## The fit

| read in the expert | written in the target | MI, nats | aligner R² | validation AUC |
|---|---|---|---|---|
{table}
"""


def _evaluated(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "\nNo evaluation is published with it.\n"
    rows = "\n".join(
        f"| {plain(r.method)} | {r.role} | {_number(r.coefficient)} | "
        f"{_number(r.effect)} [{_number(r.low)}, {_number(r.high)}] | {_number(r.nll_rise)} |"
        for r in evaluation.rows
        if r.measured
    )
    return f"""
## Evaluation

{plain(evaluation.verdict, lines=True)}

| method | role | coefficient | effect, nats [interval] | neutral NLL rise |
|---|---|---|---|---|
{rows}
"""


def _reproduce(plan: SteeringPlan) -> str:
    expert, target = (plan.provenance.get("expert") or {}), plan.target or {}
    if not expert.get("name") or not target.get("name") or "config" not in plan.provenance:
        return ""
    from expertsteer_lens.hosts.facts import TOGETHER  # hosts are slow to import

    seed = plan.provenance.get("seed", 0)
    names = [str(expert["name"])]
    if TOGETHER in str(expert.get("fingerprint")):  # of several
        names = names[0].split(TOGETHER)
    experts = " ".join(f"--expert {_shell(name)}" for name in names)
    texts = "--pairs pairs.jsonl"
    if _facts(plan, "anchors").get("given"):
        texts += " --anchors anchors.txt"
    if _facts(plan, "behaviour"):
        texts += " --behaviour behaviour.json"
    if "placement" in plan.provenance:
        texts += " --place"
    return f"""To make it again, from the texts whose hashes are in `config.json`, and with its
`provenance.config` kept as `fit.json`:

```bash
expertsteer-lens fit {experts} --target {_shell(target["name"])} \\
  {texts} --config fit.json --seed {_shell(seed)}
```

"""


def _shell(value: Any) -> str:
    """A name of others as one word of a shell command."""
    return shlex.quote(plain(value))


def _facts(plan: SteeringPlan, name: str) -> dict[str, Any]:
    """What the provenance says of some texts, if it says anything."""
    found = plan.provenance.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:.3g}"
