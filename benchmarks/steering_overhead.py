"""What steering costs: cached generation with every layer steered, beside the same model unsteered
in the same process.

    python benchmarks/steering_overhead.py --output benchmarks/results/steering_overhead.md

One process per implementation, each with the same random weights (a GPT-2 of the given size;
nothing is downloaded) and the same vectors. Steered and unsteered runs alternate, and each steered
run is divided by the unsteered one beside it; putting the steering on and taking it off is timed
too. On a busy machine the wall clock of a pair says as much about the neighbours as about steering,
so the decode steps are timed one by one as well, and the tenth percentile of the steered ones is
compared with that of the unsteered ones: steps that nobody disturbed. Of our own ways, one more run
says how much of its time was spent inside steering (what the host does to call a hook is not in
it). All implementations must emit the same tokens, unsteered and steered, or the table says so.
Other environments are given by the paths of their Python:

    --tl3 .venv-tl3/bin/python            TransformerLens 3, for HookedTransformer
    --steering-vectors PATH/bin/python    an environment with steering-vectors
    --repeng PATH/bin/python              an environment with repeng
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pages
import torch

# name in the table: (child, which Python)
WAYS = {
    "TransformerBridge, `plan.hooks`": ("bridge", "here"),
    "Hugging Face, `plan.hooks`": ("hf", "here"),
    "HookedTransformer, `plan.hooks`": ("hooked", "tl3"),
    "nnsight, `plan.hooks`": ("nnsight", "here"),
    "nnsight, `plan.edit`": ("nnsight-edit", "here"),
    "TransformerBridge, `fwd_hooks` list": ("bridge-list", "here"),
    "Hugging Face, `plan.hooks`, positions `generated`": ("hf-generated", "here"),
    "Hugging Face, a bare torch hook per layer": ("torch", "here"),
    "steering-vectors": ("steering-vectors", "steering_vectors"),
    "repeng": ("repeng", "repeng"),
}
Run = Callable[[], torch.Tensor]
Switch = Callable[[], contextlib.AbstractContextManager[Any]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, default=1024, help="width")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument(
        "--repeats", type=int, default=15, help="pairs of steered and unsteered runs"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tl3", help="Python with TransformerLens 3")
    parser.add_argument("--steering-vectors", help="Python with steering-vectors")
    parser.add_argument("--repeng", help="Python with repeng")
    parser.add_argument("--only", nargs="*", help="children to run, e.g. bridge hf")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the model, the vectors, and the ways to steer ------------------------------------------------


def huggingface(args: argparse.Namespace) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=args.vocab,
        n_embd=args.d,
        n_layer=args.layers,
        n_head=args.heads,
        n_positions=args.prompt + args.tokens + 8,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # a fixed draw, whatever the version's own initialisation does
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                0.02 if "wpe" in name else 0.05
            )
    model.generation_config.eos_token_id = None
    return model


def vectors(args: argparse.Namespace) -> list[torch.Tensor]:
    """One mean-free vector per layer: added anywhere, they mean the same with and without
    centring."""
    draws = torch.randn(args.layers, args.d, generator=torch.Generator().manual_seed(2))
    return list(0.1 * (draws - draws.mean(1, keepdim=True)))


def prompt(args: argparse.Namespace) -> torch.Tensor:
    return torch.randint(
        1, args.vocab, (1, args.prompt), generator=torch.Generator().manual_seed(3)
    )


def plan_of(args: argparse.Namespace, positions: str = "all") -> Any:
    from expertsteer_lens import SteeringPlan

    given = {f"blocks.{i}.hook_resid_post": v for i, v in enumerate(vectors(args))}
    lengths = {name: float(v.norm()) for name, v in given.items()}
    return SteeringPlan.from_vectors(
        given, coefficient=lengths, relative_to="unit", positions=positions
    )


def run_hf(args: argparse.Namespace, model: Any) -> Run:
    ids = prompt(args)
    options = {
        "max_new_tokens": args.tokens,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
    }
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def run_lens(args: argparse.Namespace, model: Any) -> Run:
    options = {
        "max_new_tokens": args.tokens,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }
    return lambda: model.generate(
        prompt(args), use_past_kv_cache=True, return_type="tokens", **options
    )


def lens_config(args: argparse.Namespace, model: Any) -> Any:
    """A HookedTransformer with the same weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = HookedTransformerConfig(
        d_model=args.d,
        n_layers=args.layers,
        n_heads=args.heads,
        d_head=args.d // args.heads,
        d_mlp=4 * args.d,
        n_ctx=args.prompt + args.tokens + 8,
        d_vocab=args.vocab,
        act_fn="gelu_new",
        normalization_type="LN",
        device="cpu",
        model_name="random-gpt2",
    )
    with small_tokenizer() as tokenizer:  # without one, its cached generation takes wrong positions
        hooked = HookedTransformer(config, tokenizer=tokenizer).eval()
    hooked.load_and_process_state_dict(
        convert_gpt2_weights(model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked


@contextlib.contextmanager
def handle(make: Callable[[], Any], remove: str = "remove") -> Any:
    made = make()
    try:
        yield
    finally:
        getattr(made, remove)()


def way(args: argparse.Namespace) -> tuple[Run, Switch, str, torch.nn.Module]:
    """How to generate, how to steer, the versions that matter, and the module that every pass runs
    last."""
    import transformers

    hf, kind, versions = huggingface(args), args.child, f"transformers {transformers.__version__}"
    if kind.startswith("bridge"):
        import transformer_lens
        from transformer_lens.model_bridge import TransformerBridge

        with small_tokenizer() as tokenizer:
            model = TransformerBridge.boot_transformers(
                "random-gpt2", hf_model=hf, tokenizer=tokenizer, device="cpu"
            )
        plan = plan_of(args)
        listed = kind == "bridge-list"
        switch = (
            (lambda: model.hooks(fwd_hooks=plan.fwd_hooks(model)))
            if listed
            else lambda: plan.hooks(model)
        )
        return (
            run_lens(args, model),
            switch,
            f"TransformerLens {version(transformer_lens)}, {versions}",
            model.unembed,
        )
    if kind == "hooked":
        import transformer_lens

        model = lens_config(args, hf)
        plan, versions = plan_of(args), f"TransformerLens {version(transformer_lens)}, {versions}"
        return run_lens(args, model), lambda: plan.hooks(model), versions, model.unembed
    if kind.startswith("nnsight"):
        import nnsight

        with small_tokenizer() as tokenizer:
            model = nnsight.TransformersModel(hf, tokenizer=tokenizer)
        plan = plan_of(args)
        edit = kind == "nnsight-edit"
        switch = (lambda: handle(lambda: plan.edit(model))) if edit else lambda: plan.hooks(model)
        return run_hf(args, model), switch, f"nnsight {nnsight.__version__}, {versions}", hf.lm_head
    if kind.startswith("hf"):
        plan = plan_of(args, "generated" if kind == "hf-generated" else "all")
        return run_hf(args, hf), lambda: plan.hooks(hf), versions, hf.lm_head
    if kind == "torch":
        return run_hf(args, hf), lambda: bare_hooks(hf, vectors(args)), versions, hf.lm_head
    if kind == "steering-vectors":
        from importlib.metadata import version as of

        from steering_vectors import SteeringVector

        steering = SteeringVector(dict(enumerate(vectors(args))), "decoder_block")
        return (
            run_hf(args, hf),
            lambda: steering.apply(hf),
            f"steering-vectors {of('steering-vectors')}, {versions}",
            hf.lm_head,
        )
    from importlib.metadata import version as of

    from repeng import ControlModel, ControlVector

    model = ControlModel(hf, list(range(args.layers)))
    control = ControlVector("gpt2", {i: v.numpy() for i, v in enumerate(vectors(args))})

    def controlled() -> Any:
        model.set_control(control, 1.0)
        return model

    return (
        run_hf(args, model),
        lambda: handle(controlled, "reset"),
        f"repeng {of('repeng')}, {versions}",
        hf.lm_head,
    )


@contextlib.contextmanager
def bare_hooks(model: Any, given: list[torch.Tensor]) -> Any:
    """The least that adding a vector to every layer can cost."""

    def adding(v: torch.Tensor) -> Any:
        return lambda _, __, out: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v

    handles = [
        b.register_forward_hook(adding(v)) for b, v in zip(model.transformer.h, given, strict=True)
    ]
    try:
        yield
    finally:
        for one in handles:
            one.remove()


@contextlib.contextmanager
def small_tokenizer() -> Any:
    """A tokenizer of three words: hosts want one, and nothing here is text."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    special = {
        "pad_token": "<pad>",
        "eos_token": "<pad>",
        "bos_token": "<pad>",
        "unk_token": "<unk>",
    }
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # TransformerLens asks where it was loaded from, and loads it again
        PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
        yield AutoTokenizer.from_pretrained(folder)


def version(module: Any) -> str:
    from importlib.metadata import version as of

    return of(module.__name__.replace("_", "-"))


# -- one implementation, timed --------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    run, switch, versions, last = way(args)
    ticks: list[float] = []
    last.register_forward_hook(
        lambda *_: ticks.append(time.perf_counter())
    )  # the last module of every pass

    def timed(steered: bool) -> tuple[dict[str, Any], torch.Tensor]:
        start = time.perf_counter()
        with switch() if steered else contextlib.nullcontext():
            entered = time.perf_counter()
            ticks.clear()  # putting it on for the first time measures the model
            tokens = run()
        steps = [after - before for before, after in itertools.pairwise(ticks)]
        assert len(steps) == args.tokens - 1, len(steps)
        return {
            "run": time.perf_counter() - start,
            "steps": steps,
            "enter": entered - start,
        }, tokens

    digests = {}
    for steered in (False, True):  # warm-up, and what is generated
        digests[steered] = digest(timed(steered)[1])
    pairs = []
    for i in range(args.repeats):
        order = (False, True) if i % 2 == 0 else (True, False)
        times = {steered: timed(steered)[0] for steered in order}
        pairs.append((times[False], times[True]))
    assert digest(timed(False)[1]) == digests[False]  # and afterwards it is as before
    print(
        json.dumps(
            {
                "pairs": pairs,
                "plain": digests[False],
                "steered": digests[True],
                "versions": versions,
                "inside": inside(args.child, lambda: timed(True)[0]["run"])
                if ours(args.child)
                else None,
            }
        )
    )


def ours(kind: str) -> bool:
    """Whether this is steered by a `PlanRun` in this process (an nnsight edit is
    not)."""
    return kind in ("bridge", "hf", "hooked", "nnsight", "bridge-list", "hf-generated")


def inside(kind: str, steered: Callable[[], float]) -> float:
    """Time spent inside steering / the rest of the time, median of three runs."""
    from expertsteer_lens.steer.run import PlanRun

    spent = 0.0

    def clocked(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return fn(*given, **named)
            finally:
                spent += time.perf_counter() - start

        return call

    functions, listed, on_forward, shares = (
        PlanRun.functions,
        PlanRun._listed,
        PlanRun.on_forward,
        [],
    )
    PlanRun._listed = lambda self, name, fn, mask: clocked(listed(self, name, fn, mask))
    PlanRun.on_forward = clocked(on_forward)
    if kind != "bridge-list":  # a list clocks the outer function
        PlanRun.functions = lambda self: {name: clocked(fn) for name, fn in functions(self).items()}
    try:
        for _ in range(3):
            spent = 0.0
            whole = steered()
            shares.append(spent / (whole - spent))
    finally:
        PlanRun.functions, PlanRun._listed, PlanRun.on_forward = functions, listed, on_forward
    return statistics.median(shares)


def digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(json.dumps(tokens.reshape(-1).tolist()).encode()).hexdigest()[:8]


# -- all of them ----------------------------------------------------------------------------------


def python_of(args: argparse.Namespace, which: str) -> str | None:
    return sys.executable if which == "here" else getattr(args, which)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def row(
    name: str, result: dict[str, Any], args: argparse.Namespace, reference: dict[str, Any]
) -> str:
    pairs = result["pairs"]
    wall = [steered["run"] / plain["run"] for plain, steered in pairs]
    step = undisturbed([plain for plain, _ in pairs])
    steps = [
        undisturbed(s) / undisturbed(p)
        for p, s in (zip(*drawn, strict=True) for drawn in redrawn(pairs))
    ]
    middle = undisturbed([steered for _, steered in pairs]) / step
    share = "" if result["inside"] is None else f"{100 * result['inside']:.1f} %"
    enter = 1e3 * min(steered["enter"] for _, steered in pairs)
    same = (result["plain"], result["steered"]) == (reference["plain"], reference["steered"])
    tokens = (
        "not steered"
        if result["plain"] == result["steered"]
        else "the same"
        if same
        else "different"
    )
    if "`generated`" in name and result["plain"] == reference["plain"]:
        tokens = "its own"  # it leaves the prompt alone, on purpose
    return (
        f"| {name} | {1e3 * step:.1f} | {percent(middle, steps)} | "
        f"{1e6 * step * (middle - 1) / args.layers:+.0f} "
        f"| {percent(statistics.median(wall), [statistics.median(r) for r in redrawn(wall)])} | "
        f"{share} | {enter:.1f} | {tokens} "
        f"| {result['versions']} |"
    )


def undisturbed(runs: Any) -> float:
    """Tenth percentile of the decode steps of some runs, seconds."""
    steps = sorted(step for one in runs for step in one["steps"])
    return steps[len(steps) // 10]


def redrawn(items: list[Any]) -> list[list[Any]]:
    """Bootstrap samples."""
    rng = random.Random(0)
    return [rng.choices(items, k=len(items)) for _ in range(1000)]


def percent(ratio: float, samples: list[float]) -> str:
    low, high = (sorted(samples)[int(q * len(samples))] for q in (0.025, 0.975))
    return f"{100 * (ratio - 1):+.1f} % ({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f})"


def machine(args: argparse.Namespace) -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in names if "model name" in line),
        platform.machine(),
    )
    load = (
        f", load average before the run {os.getloadavg()[0]:.1f}"
        if hasattr(os, "getloadavg")
        else ""
    )
    return (
        f"{model}, {os.cpu_count()} cores, {args.threads} threads{load}; torch {torch.__version__}"
    )


def main() -> None:
    args = parse()
    if args.child:
        child(args)
        return
    head, lines, reference = machine(args), [], None
    for name, (kind, which) in WAYS.items():
        if args.only and kind not in args.only:
            continue
        python = python_of(args, which)
        if python is None:
            lines.append(f"| {name} | | not run: no environment given | | | | | | |")
        else:
            done = subprocess.run(
                [python, __file__, *sys.argv[1:], "--child", kind],
                capture_output=True,
                text=True,
                env=environment(args),
            )
            if done.returncode:
                error = (done.stderr.strip().splitlines() or ["no message"])[-1]
                lines.append(f"| {name} | | does not run: `{error[:200]}` | | | | | | |")
            else:
                result = json.loads(done.stdout.splitlines()[-1])
                reference = reference or result
                lines.append(row(name, result, args, reference))
        print(lines[-1], file=sys.stderr, flush=True)
        pages.keep(table(args, head, lines), args.output)
    print(table(args, head, lines))


def environment(args: argparse.Namespace) -> dict[str, str]:
    paths = os.pathsep.join(
        [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    threads = {
        "OMP_NUM_THREADS": str(args.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # waiting is no work
    return {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}


def table(args: argparse.Namespace, head: str, lines: list[str]) -> str:
    load = f" and {os.getloadavg()[0]:.1f} after it" if hasattr(os, "getloadavg") else ""
    return "\n".join(
        [
            f"Cached generation of {args.tokens} tokens after a prompt of {args.prompt}, all "
            f"{args.layers} layers steered; random "
            f"weights, gpt2-like, d = {args.d}, {args.heads} heads, float32, batch 1.",
            "",
            f"    python benchmarks/steering_overhead.py {' '.join(public(sys.argv[1:]))}".rstrip(),
            "",
            f"Machine: {head.replace(';', load + ';', 1)}.",
            "",
            *pages.head(
                "implementation",
                "unsteered step, ms",
                "overhead, decode steps",
                "µs per layer and step",
                "overhead, whole runs",
                "time inside steering",
                "putting it on, ms",
                "tokens",
                "versions",
            ),
            *lines,
            "",
            f"Overhead: steered time / unsteered time - 1, from {args.repeats} pairs of runs one "
            "after the other in one process, in "
            "alternating order; in brackets a 95 % interval (bootstrap over pairs). Decode steps: "
            "tenth percentiles, that is steps which "
            "no other process disturbed. Whole runs: median over pairs, wall clock, putting the "
            "steering on and taking it off "
            "included. Time inside steering: measured within steered runs, relative to the rest of "
            "them, so the machine's load hardly "
            "matters. Each implementation is compared with its own host unsteered. Tokens: whether "
            "the greedy tokens, unsteered and "
            "steered, are those of the first row.",
        ]
    )


def public(argv: list[str]) -> list[str]:
    """The arguments without the folders of this machine."""
    return [f"PATH/{pathlib.Path(part).name}" if part.startswith("/") else part for part in argv]


if __name__ == "__main__":
    main()
