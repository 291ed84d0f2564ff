"""What identifies a capture, and what it says of itself."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.data.capture_plan import CapturePlan
from expertsteer_lens.data.chat import Chat, Text
from expertsteer_lens.data.read_positions import MEANS
from expertsteer_lens.data.spans import Span
from expertsteer_lens.data.texts import TEXTS_KEY, texts_sha256

from .batching import length_batches
from .facts import weights_digest
from .parts import TokenBatch

if TYPE_CHECKING:
    from .base import Host


_IDENTITY = (
    "fingerprint",
    "dtype",
    "basis",
    "hook_names",
    "positions",
    "prepend_bos",
    "rows_per_prompt",
    TEXTS_KEY,
)
"""Those facts of a capture that say what its rows are."""


def capture_plan(
    host: Host,
    texts: Sequence[Text],
    tokens: TokenBatch,
    names: Sequence[str],
    *,
    positions: str | int,
    spans: Sequence[Span] | None,
    looked_at: list[int],
    classes: Tensor | None,
    prepend_bos: bool | None,
    batch_size: int | None,
    tokens_per_pass: int,
    ends: bool,
    to_disk: bool,
) -> CapturePlan:
    """The plan of a `capture`, whose arguments these are.

    Args:
        host: of the model.
        texts: what is read.
        tokens: their tokens.
        names: hook points.
        positions: which token is read.
        spans: which part of each text.
        looked_at: tokens of each text that are looked at.
        classes: labels of the texts.
        prepend_bos: as it was asked for.
        batch_size: most texts in a pass.
        tokens_per_pass: most tokens in a pass.
        ends: whether the ends of tokens are noted.
        to_disk: whether the rows go to a folder, which is compared with later captures.
    """
    row_counts = looked_at if positions == "all" else [1] * len(texts)
    given_spans = None if spans is None else [list(span) for span in spans]
    facts = _provenance(host, texts, names, positions, prepend_bos, row_counts)
    if given_spans is not None:
        facts["spans"] = given_spans
    return CapturePlan(
        key={
            **{name: facts[name] for name in _IDENTITY},
            "tokens": _digest_of_tokens(tokens),
            "template": _digest_of_template(host, texts),
            "spans": given_spans,
            "labels": None if classes is None else classes.tolist(),
            "ends": ends,
            "autocast": _autocast(host),
            "weights": weights_digest(host._weights) if to_disk else None,
        },
        made_with={
            "host": host.kind,
            "device": host.device.type,
            "processor": platform.machine(),
            "attention": _attention(host),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "versions": facts["versions"],
            "batch_size": batch_size,
            "tokens_per_pass": tokens_per_pass,
        },
        batches=length_batches(
            tokens.lengths.tolist(), batch_size=batch_size, tokens_per_pass=tokens_per_pass
        ),
        row_counts=row_counts,
        norm_counts=looked_at if positions in MEANS and host.reads_norms else None,
        labels=None if classes is None else classes.repeat_interleave(torch.tensor(row_counts)),
        provenance=facts,
    )


def _digest_of_tokens(tokens: TokenBatch) -> str:
    """SHA-256 of the ids that the model is shown, text after text."""
    digest = hashlib.sha256()
    for row, length in zip(tokens.input_ids.cpu(), tokens.lengths.tolist(), strict=True):
        digest.update(length.to_bytes(8, "little") + row[:length].numpy().tobytes())
    return digest.hexdigest()


def _digest_of_template(host: Host, texts: Sequence[Text]) -> str | None:
    if not any(isinstance(text, Chat) for text in texts):
        return None
    return hashlib.sha256(str(host.tokenizer.chat_template).encode()).hexdigest()


def _autocast(host: Host) -> str | None:
    """The type that autocast computes in on the host's device, if it is on."""
    kind = host.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")


def _attention(host: Host) -> str | None:
    """The model's implementation of attention, where it has several."""
    name = getattr(getattr(host._weights, "config", None), "_attn_implementation", None)
    return None if name is None else str(name)


def _provenance(
    host: Host,
    texts: Sequence[Text],
    names: Sequence[str],
    positions: str | int,
    prepend_bos: bool | None,
    counts: Sequence[int],
) -> dict[str, Any]:
    return {
        "source": "capture",
        "host": host.kind,
        "name": host.name,
        "fingerprint": host.fingerprint,
        "d_model": host.d_model,
        "n_layers": host.n_layers,
        "dtype": str(host.dtype).removeprefix("torch."),
        "basis": host.basis,
        "hook_names": list(names),
        "positions": positions,
        "prepend_bos": prepend_bos
        if prepend_bos is not None
        else getattr(host.tokenizer, "bos_token_id", None) is not None,
        "rows_per_prompt": list(counts) if positions == "all" else 1,
        TEXTS_KEY: texts_sha256(texts),
        "versions": dict(_versions()),
    }


@functools.cache
def _versions() -> dict[str, str]:
    out = {}
    for package in ("expertsteer-lens", "torch", "transformers", "transformer-lens", "nnsight"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out
