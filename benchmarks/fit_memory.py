"""Resident memory of a fit, step by step: measured, and by the formula in docs/long_captures.md.

    python benchmarks/fit_memory.py --output benchmarks/results/fit_memory.md

Two Llamas with random weights and the tokenizer of the bundled target; every size in a process of
its own, with MALLOC_ARENA_MAX=1 and one thread. The kernel's high-water mark of the process is set
back at the end of each step, so that each has its own peak.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pages
from cost_8b import Shape, saved_bytes

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Sizes of one fit."""

    d_expert: int
    d_target: int
    layers: int
    pairs: int
    anchors: int
    prompts: int = 8


CASES = (
    Case(256, 192, 6, 40, 60),
    Case(512, 384, 6, 24, 60),
    Case(1024, 768, 6, 16, 60),
)
N_FOLDS, N_LAYERS, BATCH, FLOAT = 5, 4, 16, 4


def shape_of(d: int, layers: int, vocab: int) -> Shape:
    """A Llama of this width."""
    d_ff, heads = 11 * d // 4, d // 64
    params = layers * (4 * d * d + 3 * d * d_ff + 2 * d) + 2 * vocab * d + d
    return Shape("llama", params, layers, d, d_ff, heads, heads, vocab)


def expected(case: Case, facts: dict[str, Any]) -> dict[str, float]:
    """Bytes at the peak of each step, beyond what the process has after its imports.

    `facts` are those of the texts: how many were fitted on, and tokens of the longest pass."""
    e, t = (shape_of(d, case.layers, facts["vocab"]) for d in (case.d_expert, case.d_target))
    n, m, folds = facts["n_fit"], 2 * case.pairs, N_FOLDS
    k_e, k_t = (min(N_LAYERS, facts[name]) for name in ("expert_layers", "target_layers"))
    cells = k_e * e.d**2 + k_t * t.d**2 + k_e * k_t * e.d * t.d
    of_a_text = FLOAT * case.layers * (e.d + t.d)
    weights = FLOAT * (e.params + t.params)
    moments = 8 * folds * cells
    # Float32 of all tokens, of those paired, and of a fold's share of them two copies in float64.
    of_a_pass = (4 + 4 + 20 // folds) * facts["pass_tokens"] * (k_e * e.d + k_t * t.d)
    maps = k_e * k_t * 2 * FLOAT * e.d * t.d
    graph = facts["behaviour_tokens"] * (
        t.layers * saved_bytes(t, facts["longest"]) * FLOAT / 2 + 28 * t.vocab
    )
    # Of a layer of the expert: sums of the folds, and eigenvectors and held-out sums of every
    # training set; of a target layer: sums of the folds; of a pair: crossed sums, and the solution.
    layer_e, layer_t = (3 * folds + 5) * e.d**2, (folds + 2) * t.d**2
    aligning = 8 * (layer_e + k_t * layer_t + (5 * folds + 4) * e.d * t.d)
    rfm = FLOAT * m * t.d + 3 * 8 * m * min(m, t.d)
    states = (n + m + facts["n_compared"]) * of_a_text
    return {
        "models": weights,
        "capture": weights + m * of_a_text,
        "attribute": weights + m * of_a_text + graph,
        "anchors": weights + states + moments + of_a_pass,
        "pair": weights + states + moments,
        "align": weights + states + moments + aligning + maps,
        "learn": weights + states + moments + maps + k_e * k_t * rfm,
    }


# -- one size, in a process of its own ------------------------------------------------------------


def _status(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def peak_since_last() -> int:
    """The largest resident size since the last call."""
    found = _status("VmHWM")
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return found


def run(case: Case) -> dict[str, Any]:
    """Fit, and say what was resident."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import expertsteer_lens as esl

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(str(esl.zoo.model_path("target")))
    warm_up(esl)
    base = resident()
    peak_since_last()
    peaks: dict[str, int] = {}
    models = []
    for seed, d in enumerate((case.d_expert, case.d_target)):
        torch.manual_seed(seed)
        shape = shape_of(d, case.layers, len(tokenizer))
        config = LlamaConfig(
            hidden_size=d,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocab,
        )
        model = LlamaForCausalLM(config).eval()
        model.tokenizer = tokenizer
        models.append(model)
    peaks["models"] = peak_since_last()

    def on_step(step: dict[str, Any]) -> None:
        peaks[step["step"]] = peak_since_last()

    fit = esl.ExpertSteer(
        esl.ExpertSteerConfig(
            batch_size=BATCH, mi=esl.MIConfig(n_permutations=2, n_bootstrap=4, n_components=4)
        )
    ).fit(
        *models,
        esl.zoo.contrast_pairs(case.pairs),
        anchors=esl.zoo.anchors(case.anchors),
        behaviour=esl.zoo.behaviour(case.prompts),
        progress=False,
        on_step=on_step,
    )
    behaviour = fit.validation_behaviour
    texts = [
        prompt + completion
        for i, prompt in enumerate(behaviour.prompts)
        for side in behaviour.completions(i)
        for completion in side
    ]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    read = [*esl.zoo.contrast_pairs(case.pairs).texts, *esl.zoo.anchors(case.anchors)]
    pairs = fit.data.token_moments.pairs
    return {
        "base": base,
        "peaks": peaks,
        "n_fit": fit.data.n_anchors,
        "n_compared": fit.data.n_compared,
        "vocab": len(tokenizer),
        "longest": max(lengths),
        "pass_tokens": BATCH * max(map(len, tokenizer(read).input_ids)),
        "behaviour_tokens": max(lengths) * min(BATCH, len(texts)),
        "expert_layers": len({e for e, _ in pairs}),
        "target_layers": len({t for _, t in pairs}),
    }


def warm_up(esl: Any) -> None:
    """A fit on the bundled pair, so that what is imported late counts as imports."""
    expert, target = esl.zoo.load_pair(host="huggingface")
    config = esl.ExpertSteerConfig(mi={"n_permutations": 2, "n_bootstrap": 4, "n_components": 2})
    esl.ExpertSteer(config).fit(
        expert,
        target,
        esl.zoo.contrast_pairs(6),
        anchors=esl.zoo.anchors(20),
        behaviour=esl.zoo.behaviour(4),
        progress=False,
    )


# -- the table ------------------------------------------------------------------------------------


def report(cases: list[Case], measured: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "`python benchmarks/fit_memory.py`: two Llamas with random weights, float32, "
        f"{cases[0].layers} blocks each, batches of {BATCH}; MiB beyond what the process has after "
        "its imports and a first small fit "
        f"({min(m['base'] for m in measured) / MIB:.0f} to "
        f"{max(m['base'] for m in measured) / MIB:.0f} MiB).",
        "",
        *pages.head(
            "d of expert, target",
            "texts of pairs, anchors",
            "step",
            "measured",
            "formula",
            "measured / formula, with imports",
        ),
    ]
    for case, facts in zip(cases, measured, strict=True):
        base, formula = facts["base"], expected(case, facts)
        what = f"{case.d_expert}, {case.d_target} | {2 * case.pairs}, {facts['n_fit']}"
        rows = {step: facts["peaks"][step] - base for step in formula}
        steps = [(step, rows[step], formula[step]) for step in formula]
        steps.append(("**whole fit**", max(rows.values()), max(formula.values())))
        for step, found, wanted in steps:
            ratio = (found + base) / (wanted + base)
            lines.append(
                f"| {what} | {step} | {found / MIB:.0f} | {wanted / MIB:.0f} | {ratio:.2f} |"
            )
            what = " | "
    return "\n".join(lines)


def main() -> None:
    """Run every size, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", type=json.loads, help="one size, as JSON; prints what it measured"
    )
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(run(Case(**args.case))))
        return
    measured = []
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    for case in CASES:
        command = [sys.executable, __file__, "--case", json.dumps(vars(case))]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        print(measured[-1], file=sys.stderr)
    pages.show(report(list(CASES), measured), args.output)


if __name__ == "__main__":
    main()
