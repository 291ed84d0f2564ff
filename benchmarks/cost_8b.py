"""Memory and time of a fit on two 8B models: a model of the cost, and a check of its constants at
small scale.

    python benchmarks/cost_8b.py            # the tables of docs/recipe_8b.md
    python benchmarks/cost_8b.py --measure  # the constants, on this machine in about two minutes

Nothing here runs an 8B model. Every line of a table is a formula of the numbers in `Shape`, `Work`
and `Machine`."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A decoder as its configuration describes it."""

    name: str
    params: float
    layers: int
    d: int
    d_ff: int
    heads: int
    kv_heads: int
    vocab: int


EXPERT = Shape("expert, Llama-3-8B shape", 8.03e9, 32, 4096, 14336, 32, 8, 128_256)
TARGET = Shape("target, Qwen3-8B shape", 8.19e9, 36, 4096, 12288, 32, 8, 151_936)


@dataclass(frozen=True)
class Work:
    """Texts and settings of the recipe; `batch` is ExpertSteerConfig.batch_size, the others are the
    package's defaults."""

    pairs: int = 250
    anchors: int = 700
    held_out: float = 0.3
    prompts: int = 100
    completions: int = 4
    tokens: int = 150
    """Of one text, on average; benchmark questions with their answers."""
    batch: int = 16
    metric_batch: int = 16
    """Completions per pass without gradients."""
    compared: int = 1024
    """Token pairs that layers are compared on."""
    candidates: int = 32
    curve: int = 10
    """Coefficients measured by the calibration: those of the search, and the points of its curve."""
    bisection: int = 3
    """Passes over the calibration texts to calibrate one control."""
    n_random: int = 5
    n_shuffles: int = 3
    n_layers: int = 4
    """Layers of either model whose tokens are paired, where both models are loaded."""
    n_folds: int = 5

    @property
    def fitted(self) -> int:
        """Anchors that the maps are fitted on."""
        return self.anchors - 2 * self.neutral

    @property
    def neutral(self) -> int:
        """Calibration texts, and as many test texts."""
        return round(self.anchors * self.held_out / 2)


@dataclass(frozen=True)
class Machine:
    """Assumptions. The GPU's rate is what dense bf16 kernels reach on one H100-class card at these
    sizes, not its peak."""

    gpu_flops: float = 2.0e14
    pair_seconds: float = 0.61
    """CPU seconds per layer pair of `fit_aligner_grid` at 490 anchors and d = 4096 (--measure)."""
    layer_seconds: float = 0.41
    """CPU seconds to decompose one layer, of either model, at that size (--measure)."""
    rfm_seconds: float = 1.59
    """CPU seconds of one `fit_rfm` with the default search, 500 rows, d = 4096 (--measure)."""
    mi_seconds: float = 35.5
    """CPU seconds of `layer_pair_mi`, 32 x 32 layers, n = 512, d = 4096
    (benchmarks/results/mi_speed.md)."""
    cores: int = 8
    """Cores the linear algebra keeps busy."""


def token_moments(work: Work, expert: Shape, target: Shape) -> float:
    """Bytes of the moments of the token pairs, which a fit with both models loaded fits its maps
    on; see `PairingConfig.n_layers`."""
    k, e, t = work.n_layers, expert.d, target.d
    return 8 * work.n_folds * k * (e * e + t * t + k * e * t)


def saved_bytes(shape: Shape, tokens: int) -> float:
    """bf16 bytes that one token leaves behind in one block for the backward pass, eager attention
    over `tokens` tokens.

    An estimate from above: measured 0.84 to 0.88 of it (--measure). Two norms (float32 input, its
    normalised copy, bf16 output twice), queries and keys before and after rotation, values,
    attention (bf16 scores, float32 softmax, bf16 weights), its output, and the gated MLP (four
    times its width)."""
    d, kv = shape.d, shape.d * shape.kv_heads / shape.heads
    norms, attention, mlp = 2 * 10 * d, 8 * shape.heads * tokens, 8 * shape.d_ff
    return norms + 4 * (d + kv) + 2 * kv + 4 * d + attention + mlp


def memory(work: Work, expert: Shape, target: Shape) -> list[tuple[str, str, float]]:
    """(what, formula, bytes) on the GPU and in the host's memory."""
    rows = work.batch * work.tokens
    graph = rows * target.layers * saved_bytes(target, work.tokens)
    n_rows = work.fitted + 2 * work.pairs + work.compared
    states = 4 * n_rows * (expert.layers * expert.d + target.layers * target.d)
    rank = min(work.fitted - 1, expert.d, target.d)
    aligner = 8 * rank * (expert.d + target.d)
    held = target.layers - 2 + work.candidates
    side = 8 * work.fitted * (2 * target.d + 3 * work.fitted)
    return [
        ("GPU: weights, bf16", "2 (P_expert + P_target)", 2 * (expert.params + target.params)),
        ("GPU: attribution, stored blocks", "batch tokens L saved_bytes", graph),
        ("GPU: attribution, logits", "batch tokens vocab 14", rows * target.vocab * 14),
        (
            "GPU: metric, logits",
            "metric_batch tokens vocab 10",
            work.metric_batch * work.tokens * target.vocab * 10,
        ),
        ("CPU: states, float32", "4 (n_fit + 2 n_pairs + compared) (L_e d_e + L_t d_t)", states),
        ("CPU: maps held at once", "(L_t - 2 + candidates) 8 rank (d_e + d_t)", held * aligner),
        (
            "CPU: decomposed target layers",
            "(L_t - 2) 8 n_fit (2 d_t + 3 n_fit)",
            (target.layers - 2) * side,
        ),
        (
            "CPU: moments of token pairs (both models loaded; in place of the last two)",
            "8 n_folds n_layers (d_e^2 + d_t^2 + n_layers d_e d_t)",
            token_moments(work, expert, target),
        ),
    ]


def seconds(
    work: Work, expert: Shape, target: Shape, machine: Machine = Machine()
) -> list[tuple[str, str, float]]:
    """(step, what it is made of, seconds)."""
    texts = work.fitted + 2 * work.pairs
    scored = work.prompts // 2 * work.completions
    forward = {shape: 2 * shape.params * work.tokens for shape in (expert, target)}
    calibrate = work.curve * (work.neutral + scored)
    controls = work.n_random + work.n_shuffles + 3
    evaluate = (controls + work.n_random + 2) * (
        scored + 3 * work.neutral
    ) + controls * work.bisection * work.neutral
    grid = expert.layers * (target.layers - 2)
    cpu = machine.cores
    mi = machine.mi_seconds * expert.layers * target.layers / 32**2
    aligning = (
        grid * machine.pair_seconds + (expert.layers + target.layers - 2) * machine.layer_seconds
    )
    rfms = work.candidates + work.n_shuffles + target.layers - 2
    return [
        (
            "read the states (GPU)",
            f"{texts} texts through both models",
            texts * sum(forward.values()) / machine.gpu_flops,
        ),
        (
            "attribution (GPU)",
            f"{scored} completions, forward and backward",
            2 * scored * forward[target] / machine.gpu_flops,
        ),
        ("mutual information (CPU)", f"{expert.layers} x {target.layers} layers", mi / cpu),
        ("maps (CPU)", f"{grid} layer pairs, {work.fitted} anchors", aligning / cpu),
        (
            "directions (CPU)",
            f"{rfms} RFMs, the native ceiling's included",
            rfms * machine.rfm_seconds / cpu,
        ),
        (
            "strength (GPU)",
            f"at most {calibrate} texts",
            calibrate * forward[target] / machine.gpu_flops,
        ),
        ("evaluation (GPU)", f"{evaluate} texts", evaluate * forward[target] / machine.gpu_flops),
    ]


def tables(
    work: Work = Work(),
    machine: Machine = Machine(),
    expert: Shape = EXPERT,
    target: Shape = TARGET,
) -> str:
    """Both tables in Markdown."""
    lines = ["| memory | formula | GiB |", "|---|---|---|"]
    lines += [
        f"| {what} | `{formula}` | {value / GIB:.1f} |"
        for what, formula, value in memory(work, expert, target)
    ]
    found = {what: value for what, _, value in memory(work, expert, target)}
    passes = max(
        found["GPU: attribution, stored blocks"] + found["GPU: attribution, logits"],
        found["GPU: metric, logits"],
    )
    both = found["GPU: weights, bf16"] + passes
    apart = max(2 * expert.params, 2 * target.params + passes)
    lines += [
        f"| **GPU peak** | weights + the larger of attribution and metric | **{both / GIB:.1f}** |"
    ]
    lines += [
        "| **GPU peak, expert captured first** | the same with the target's weights alone | "
        f"**{apart / GIB:.1f}** |",
        "",
    ]
    lines += ["| step | made of | seconds |", "|---|---|---|"]
    steps = seconds(work, expert, target, machine)
    lines += [f"| {step} | {parts} | {value:.0f} |" for step, parts, value in steps]
    total = sum(value for *_, value in steps)
    lines += [f"| **total** | | **{total:.0f}** (about {total / 60:.0f} minutes) |"]
    return "\n".join(lines)


def measure() -> None:
    """Print the constants of `Machine` and the check of `saved_bytes`, on this machine, one
    thread."""
    import expertsteer_lens as esl
    from expertsteer_lens.align import AlignerConfig, fit_aligner_grid

    torch.set_num_threads(1)
    config = AlignerConfig(kind="anchored_autoencoder")
    print("| what | size | CPU seconds |\n|---|---|---|")
    for n, d in ((490, 1024), (490, 4096), (980, 4096)):
        expert, target = states(n, d, 2, 0), states(n, d, 4, 1)
        kept: dict = {}
        spent = []
        for e in expert:
            start = time.process_time()
            maps = fit_aligner_grid(
                expert, target, config, pairs=[(e, t) for t in target], decomposed=kept
            )
            spent.append(time.process_time() - start)
        # first call: 1 expert layer + 4 target layers + 4 pairs; second: 1 expert layer + 4 pairs
        layer = (spent[0] - spent[1]) / 4
        print(f"| decompose a layer | n = {n}, d = {d} | {layer:.2f} |")
        print(f"| fit a layer pair | n = {n}, d = {d} | {(spent[1] - layer) / 4:.2f} |")
    size = (
        sum(
            f.numel() * f.element_size()
            for m in (maps[e, t].encoder for t in target)
            for f in m.factors
        )
        / 4
    )
    print(
        f"| bytes of one map's encoder | n = 980, d = 4096 | {size / (4 * 979 * 8192):.3f} of the "
        "formula |"
    )
    x = states(500, 4096, 1, 2)["blocks.0.hook_resid_post"]
    start = time.process_time()
    esl.fit_rfm(x, (x[:, 0] > x[:, 0].median()).float())
    print(f"| `fit_rfm`, default search | n = 500, d = 4096 | {time.process_time() - start:.2f} |")
    for tokens in (50, 150):
        found, expected = measure_saved(tokens)
        print(
            f"| stored bytes per token and block, TransformerBridge | {tokens} tokens, d = 256 | "
            f"{found / expected:.2f} of the formula |"
        )


def states(n: int, d: int, layers: int, seed: int, *, factors: int = 64) -> dict[str, torch.Tensor]:
    """Random states with shared factors, so that maps between them exist."""
    shared = torch.randn(n, factors, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{i}.hook_resid_post": shared @ torch.randn(factors, d, generator=generator)
        + torch.randn(n, d, generator=generator)
        for i in range(layers)
    }


def measure_saved(tokens: int) -> tuple[float, float]:
    """Bytes per token and block kept for the backward pass by a small Llama in bf16 on its
    TransformerBridge, and the formula's."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    import expertsteer_lens as esl

    shape = Shape("small", 0, 2, 256, 896, 8, 2, 64)

    def kept(layers: int) -> float:
        config = LlamaConfig(
            hidden_size=shape.d,
            intermediate_size=shape.d_ff,
            num_attention_heads=shape.heads,
            vocab_size=600,
            num_key_value_heads=shape.kv_heads,
            num_hidden_layers=layers,
        )
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.bfloat16
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(str(esl.zoo.model_path("target")))
        bridge = TransformerBridge.boot_transformers(
            "small", hf_model=model, tokenizer=tokenizer, device="cpu", dtype=torch.bfloat16
        )
        weights = {p.untyped_storage().data_ptr() for p in bridge.parameters()}
        seen: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
            return x

        alive: list[torch.Tensor] = []
        ids = torch.randint(5, 500, (2, tokens))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = bridge(ids, attention_mask=torch.ones_like(ids))
        del out
        return sum(seen.values()) / ids.numel()

    return (kept(3) - kept(1)) / 2, saved_bytes(shape, tokens)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the constants instead of printing the tables",
    )
    if parser.parse_args().measure:
        measure()
    else:
        print(tables())


if __name__ == "__main__":
    main()
