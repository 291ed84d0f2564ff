"""Two tiny language models trained by this project, and the texts to steer them with: the offline
default.

`expert` is a LayerNorm GPT-2-like model and `target` an RMSNorm Llama-like one. They differ in
width, depth, family and tokenizer, tell the same small stories (`zoo.world`), and know two moods:
positive is happy, negative is sad. Both were trained on CPU from this project alone
(`tools/zoo/train_zoo.py`; recipe and figures in `zoo/README.md`).

A host is imported only when a model is loaded; no model hub is ever asked.
"""

from __future__ import annotations

import importlib
import pathlib
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import check_choice, check_number

if TYPE_CHECKING:
    from expertsteer_lens.data.behaviour import Behaviour
    from expertsteer_lens.data.contrast import ContrastPairs
    from expertsteer_lens.hosts.loading import LoadedAs

__all__ = [
    "anchors",
    "behaviour",
    "contrast_pairs",
    "load",
    "load_pair",
    "model_path",
    "names",
    "neutral_texts",
    "prompts",
]

_MODELS_DIR = pathlib.Path(__file__).parent / "models"


def names() -> list[str]:
    """Names of the models: `["expert", "target"]`."""
    return ["expert", "target"]


def model_path(name: str) -> pathlib.Path:
    """The folder of a model: an ordinary Hugging Face folder (float16 weights, to be loaded as
    float32).

    Raises:
        ArgumentError: unknown name.
    """
    return _MODELS_DIR / check_choice("name", name, names())


def load(name: str, host: LoadedAs = "transformer_lens") -> Any:
    """Load one model in float32, in eval mode, on CPU.

    Args:
        name: `expert` or `target`.
        host: `transformer_lens` gives a `TransformerBridge` (raw weights, no compatibility mode);
            `huggingface` gives the `transformers` model with its tokenizer as the attribute
            `.tokenizer`; `nnsight` gives a `TransformersModel`.

    Each call loads anew, so hooks on one copy never reach another.

    Raises:
        ArgumentError: unknown name or host.
    """
    return load_folder(model_path(name), f"zoo-{name}", host)


def load_folder(path: pathlib.Path, name: str, host: LoadedAs = "transformer_lens") -> Any:
    """Load the Hugging Face folder `path` as `load` does; `name` is what TransformerLens calls
    it."""
    from expertsteer_lens.hosts.loading import LOADABLE, wrap_model

    check_choice("host", host, LOADABLE)
    hf_model, tokenizer = _load_huggingface(path)
    return wrap_model(hf_model, tokenizer, host=host, name=name)


def load_pair(host: LoadedAs = "transformer_lens") -> tuple[Any, Any]:
    """`(expert, target)`, both as `load` gives them."""
    return load("expert", host), load("target", host)


def contrast_pairs(n: int = 200, seed: int = 0) -> ContrastPairs:
    """`n` pairs of short stories with the same cast and opening: positive happy, negative sad.

    The mood shows in events, weather, faces, speech and manner; no text holds a feeling word that
    is a completion of `behaviour`, so what transfers is the mood and not those words. Openings are
    of the split `pairs`, never trained on."""
    from expertsteer_lens.data.contrast import ContrastPairs

    from . import world

    check_number("n", n, low=2, integer=True)
    rng = random.Random(f"pairs-{seed}")
    seen: set[str] = set()
    positive: list[str] = []
    negative: list[str] = []
    while len(positive) < n:
        opening, cast = world.draw_opening(rng, "pairs")
        length = rng.randint(2, 4)
        if opening in seen:
            continue
        seen.add(opening)
        for mood, texts in (("happy", positive), ("sad", negative)):
            texts.append(
                " ".join([opening, *world.body(rng, cast, mood, length, kinds=world.PLAIN_KINDS)])
            )
    return ContrastPairs.from_lists(positive=positive, negative=negative)


def anchors(n: int = 400, seed: int = 0, moods: Mapping[str, float] | None = None) -> list[str]:
    """`n` unlabelled stories as the world tells them, of every mood, for aligning two models.

    Nobody has to know their mood; it varies, so that a map fitted on them can carry it. `moods`
    sets the weights of happy, sad and neutral stories: `{"neutral": 1.0}` gives anchors that never
    vary along the mood, on which no map can learn where it lies (a negative control). Openings are
    of the split `anchors`, so none is a training text, a pair or a prompt of `behaviour`."""
    from . import world

    return [story.text for story in world.stories(n, seed=seed, split="anchors", moods=moods)]


def neutral_texts(n: int = 100, seed: int = 0) -> list[str]:
    """`n` stories without a mood, of the split `validation`: for the cost of steering (rise of NLL)
    on neutral text."""
    from . import world

    return [
        story.text
        for story in world.stories(n, seed=seed, split="validation", moods={"neutral": 1.0})
    ]


def behaviour(n: int = 100, seed: int = 0) -> Behaviour:
    """`n` neutral beginnings that stop before a feeling is named, with happy and sad words to
    complete them.

    A prompt is an opening, up to two neutral sentences and the beginning of a feeling sentence. The
    completions are shared by all prompts: positive ` happy`, ` glad`, ...; negative ` sad`, `
    upset`, ..."""
    from expertsteer_lens.data.behaviour import Behaviour

    from . import lexicon, world

    check_number("n", n, low=1, integer=True)
    rng = random.Random(f"behaviour-{seed}")
    texts: list[str] = []
    while len(texts) < n:
        beginning, cast = _beginning(rng, "behaviour")
        text = f"{beginning} {world.feeling_stem(rng, cast)}"
        if text not in texts:
            texts.append(text)
    completions = {
        mood: tuple(f" {word}" for word in lexicon.FEELINGS[mood]) for mood in ("happy", "sad")
    }
    return Behaviour(
        prompts=tuple(texts), positive=completions["happy"], negative=completions["sad"]
    )


def prompts(n: int = 8, seed: int = 0) -> list[str]:
    """`n` neutral beginnings of whole sentences, to generate from; openings are of the split
    `validation`."""
    check_number("n", n, low=1, integer=True)
    rng = random.Random(f"prompts-{seed}")
    return [_beginning(rng, "validation")[0] for _ in range(n)]


def _beginning(rng: random.Random, split: str) -> tuple[str, dict[str, str]]:
    from . import world

    opening, cast = world.draw_opening(rng, split)
    return " ".join([opening, *world.setting(rng, cast)]), cast


def _load_huggingface(path: pathlib.Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for a hundred small tensors is noise
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def __getattr__(name: str) -> Any:
    if name == "domains":  # the models and tasks of the benchmark
        return importlib.import_module(".domains", __name__)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join([*__all__, 'domains'])}"
    )
