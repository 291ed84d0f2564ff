"""Train the two models of the zoo from scratch on CPU: `python tools/zoo/train_zoo.py --out DIR`.

Everything that enters is in this project: the texts come from `expertsteer_lens.zoo.world`, each
batch is fresh, and the tokenizers are trained on the same texts. Same seed, same thread count, same
torch build: same weights. The README of `expertsteer_lens/zoo` has the measured times and
validation losses. `train_domains.py` trains the models of the benchmark in the same way on its own
texts.

Not a part of the installed package, which holds the trained models only."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import expertsteer_lens.zoo
from expertsteer_lens.zoo import world

MODELS_DIR = pathlib.Path(expertsteer_lens.zoo.__file__).parent / "models"
Source = Callable[[int, int, str], list[str]]
"""`source(n, seed, split)`: n texts of a split, "train" or "validation"."""


def stories(n: int, seed: int, split: str) -> list[str]:
    """The source of the two models of the zoo."""
    return [story.text for story in world.stories(n, seed=seed, split=split)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is made."""

    family: str
    """`gpt2` (LayerNorm, learned positions, byte-level BPE), `neox` (LayerNorm, rotary, attention
    and MLP in parallel, byte-level BPE) or `llama` (RMSNorm, rotary, metaspace BPE)."""
    d_model: int
    """Residual width."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Attention heads; the Llama has half as many key-value heads."""
    vocab_size: int
    """Size of the tokenizer, special tokens included."""
    n_steps: int
    """AdamW steps."""
    learning_rate: float
    """Peak of the cosine schedule, reached after 5 % of the steps; it ends at a hundredth."""
    tokens_per_batch: int = 1536
    """Upper bound of rows times positions per step."""
    n_ctx: int = 192
    """Longest input of the model."""
    no_bos_probability: float = 0.15
    """Share of rows without the first BOS, so that the models also read texts that lack one."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; at these widths more than the usual 0.02 learns to
    copy names sooner."""
    seed: int = 0
    """Of weights and texts."""


RECIPES = {
    "expert": Recipe(
        family="gpt2",
        d_model=128,
        n_layers=6,
        n_heads=4,
        vocab_size=1024,
        n_steps=2400,
        learning_rate=4e-3,
        init_std=0.05,
        seed=1,
    ),
    "target": Recipe(
        family="llama",
        d_model=96,
        n_layers=5,
        n_heads=4,
        vocab_size=640,
        n_steps=3600,
        learning_rate=3e-3,
        seed=2,
    ),
}


_CARD = """# zoo/{name}

A tiny causal language model trained from scratch on CPU with the command below, on texts that the
same package generates; nothing else entered. Licence: MIT, as the package.

Weights are stored in float16 and meant to be loaded as float32. Losses are in nats per token.

| recipe and measurement | |
|---|---|
{rows}
"""


def build_tokenizer(recipe: Recipe, source: Source = stories) -> Any:
    """Train the tokenizer of a recipe on 6000 texts of the training split.

    The GPT-2-like one has a single special token (BOS = EOS, no padding token) and adds no BOS by
    itself; the Llama-like one has four and adds BOS: the two habits met in the wild."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    texts = source(6000, recipe.seed, "train")
    if recipe.family != "llama":
        tok = tk.Tokenizer(tk.models.BPE())
        tok.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = tk.decoders.ByteLevel()
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    else:
        tok = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))
        parts = [
            tk.pre_tokenizers.Metaspace(prepend_scheme="always"),
            tk.pre_tokenizers.Punctuation(),
        ]
        tok.pre_tokenizer = tk.pre_tokenizers.Sequence(parts)
        tok.decoder = tk.decoders.Metaspace(prepend_scheme="always")
        special = {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
        }
        alphabet = [chr(code) for code in range(33, 127)]
    trainer = tk.trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    if recipe.family == "llama":
        tok.post_processor = tk.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tok.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        model_max_length=recipe.n_ctx,
        clean_up_tokenization_spaces=False,
        **special,
    )


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """A freshly initialised model of a recipe; the caller seeds torch."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if recipe.family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=recipe.n_ctx,
                n_embd=recipe.d_model,
                n_layer=recipe.n_layers,
                n_head=recipe.n_heads,
                n_inner=3 * recipe.d_model,
                activation_function="gelu_pytorch_tanh",  # the function of gelu_new in one kernel
                initializer_range=recipe.init_std,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ids,
            )
        )
    if recipe.family == "neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.d_model,
                intermediate_size=3 * recipe.d_model,
                num_hidden_layers=recipe.n_layers,
                num_attention_heads=recipe.n_heads,
                max_position_embeddings=recipe.n_ctx,
                initializer_range=recipe.init_std,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
                tie_word_embeddings=False,
                **ids,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.d_model,
            intermediate_size=8 * recipe.d_model // 3,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_heads // 2,
            max_position_embeddings=recipe.n_ctx,
            initializer_range=recipe.init_std,
            tie_word_embeddings=False,
            **ids,
        )
    )


def batches(
    tokenizer: Any, recipe: Recipe, *, split: str, seed: int, source: Source = stories
) -> Iterator[Tensor]:
    """Endless `[rows, pos]` tensors of token ids, -1 where padded, about `tokens_per_batch` tokens
    each.

    Three batches in four hold one text a row, of similar lengths; the fourth holds rows of `n_ctx`
    tokens with one text after the other, so that every position is trained. Some rows lack the
    first BOS (`no_bos_probability`)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rng = random.Random(f"batches-{seed}")
    while True:
        texts = source(1024, rng.getrandbits(40), split)
        rows = [
            [bos, *ids, eos][: recipe.n_ctx]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        packed = _pack_rows(rows[: len(rows) // 4], recipe.n_ctx, bos == eos)
        single = sorted(rows[len(rows) // 4 :], key=len)
        groups = [
            *_group_rows(packed, recipe.tokens_per_batch),
            *_group_rows(single, recipe.tokens_per_batch),
        ]
        rng.shuffle(groups)
        for group in groups:
            cut = [row[1:] if rng.random() < recipe.no_bos_probability else row for row in group]
            longest = max(map(len, cut))
            yield torch.tensor([row + [-1] * (longest - len(row)) for row in cut])


def _pack_rows(texts: list[list[int]], n_ctx: int, shared: bool) -> list[list[int]]:
    """Rows of `n_ctx` tokens, each starting with a story; the last story of a row is cut."""
    rows: list[list[int]] = []
    row: list[int] = []
    for text in texts:
        row = row + (text[1:] if shared and row else text)
        if len(row) >= n_ctx:
            rows.append(row[:n_ctx])
            row = []
    return rows


def _group_rows(rows: list[list[int]], n_tokens: int) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for row in rows:
        if group and (len(group) + 1) * max(len(row), max(map(len, group))) > n_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@torch.no_grad()
def validation_loss(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    *,
    n_batches: int = 20,
    seed: int = 0,
    source: Source = stories,
) -> float:
    """Mean negative log-likelihood in nats per token on texts of the validation split."""
    model.eval()
    stream = batches(tokenizer, recipe, split="validation", seed=seed, source=source)
    total = count = 0.0
    for _ in range(n_batches):
        ids = next(stream)
        predicted = float((ids[:, 1:] >= 0).sum())
        total += float(_loss(model, ids)) * predicted
        count += predicted
    model.train()
    return total / count


def train(
    name: str,
    recipe: Recipe,
    out: pathlib.Path,
    *,
    source: Source = stories,
    script: str = "tools/zoo/train_zoo.py",
    log_every: int = 100,
) -> dict[str, Any]:
    """Train one model, write its folder under `out / name` and return what was measured; `script`
    is the one to run."""
    started, cpu_started = time.perf_counter(), time.process_time()
    tokenizer = build_tokenizer(recipe, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_model(recipe, tokenizer)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: _learning_rate(step, recipe.n_steps)
    )
    stream = batches(tokenizer, recipe, split="train", seed=recipe.seed + 100, source=source)
    model.train()
    for step in range(recipe.n_steps):
        loss = _loss(model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if log_every and (step + 1) % log_every == 0:
            _say(
                f"{name} step {step + 1}/{recipe.n_steps} loss {loss:.3f} after "
                f"{time.perf_counter() - started:.0f} s"
            )
    facts = {
        "command": f"python {script} --model {name}",
        "seconds": round(time.perf_counter() - started),
        "cpu_seconds": round(time.process_time() - cpu_started),
        "n_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "validation_loss": round(validation_loss(model, tokenizer, recipe, source=source), 4),
    }
    save(model, tokenizer, recipe, out / name, facts)
    _say(f"{name}: {facts}")
    return facts


def save(
    model: Any, tokenizer: Any, recipe: Recipe, folder: pathlib.Path, facts: dict[str, Any]
) -> None:
    """Write an ordinary Hugging Face folder: float16 weights, marked to be loaded as float32, and
    the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    if recipe.family == "gpt2":
        config["activation_function"] = "gelu_new"  # the family's own name for the same function
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    (folder / "recipe.json").write_text(
        json.dumps({"recipe": asdict(recipe), "measured": facts}, indent=2) + "\n"
    )
    rows = "\n".join(f"| {key} | {value} |" for key, value in {**asdict(recipe), **facts}.items())
    (folder / "README.md").write_text(_CARD.format(name=folder.name, rows=rows))


def _loss(model: Any, ids: Tensor) -> Tensor:
    # Padding is on the right, so a causal model needs no mask: no real token can attend to it.
    logits = model(input_ids=ids.clamp(min=0)).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1
    )


def _learning_rate(step: int, n_steps: int) -> float:
    warmup = max(1, n_steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the models of the zoo.")
    parser.add_argument(
        "--out", type=pathlib.Path, default=MODELS_DIR, help="folder that receives <model>/"
    )
    parser.add_argument("--model", choices=sorted(RECIPES), help="default: all of them")
    arguments = parser.parse_args()
    for name in [arguments.model] if arguments.model else sorted(RECIPES):
        train(name, RECIPES[name], arguments.out)


if __name__ == "__main__":
    main()
