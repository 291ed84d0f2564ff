"""Which texts share a pass, which rows of a pass are kept, and that neither changes a number."""

from __future__ import annotations

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.batching import LEAST_SHARE, MOST_PADDING, length_batches
from expertsteer_lens.hosts.row_picker import RowPicker, take_rows

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
WORDS = "the cat was happy and sad then they ran home with a friend in the snow"
TEXTS = [" ".join((WORDS.split(" ") * 3)[i % 5 : i % 5 + 1 + 7 * i % 40]) for i in range(30)]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    batch_size=st.none() | st.integers(1, 9),
    tokens_per_pass=st.integers(1, 200),
)
def test_every_text_is_in_one_pass_which_is_within_its_limits(lengths, batch_size, tokens_per_pass):
    batches = length_batches(lengths, batch_size=batch_size, tokens_per_pass=tokens_per_pass)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        n_tokens = max(sizes) * len(sizes)
        assert n_tokens <= tokens_per_pass or len(batch) == 1
        assert batch_size is None or len(batch) <= batch_size
        padding = n_tokens - sum(sizes)
        assert padding <= MOST_PADDING * n_tokens or n_tokens <= LEAST_SHARE * tokens_per_pass
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    again = length_batches(
        torch.tensor(lengths), batch_size=batch_size, tokens_per_pass=tokens_per_pass
    )
    assert again == batches


def test_numbers_below_one_are_refused():
    for changes in ({"batch_size": 0}, {"batch_size": None, "tokens_per_pass": 0}):
        with pytest.raises(ArgumentError, match="must be an integer in"):
            length_batches([3, 4], **{"batch_size": 1, **changes})


@pytest.mark.parametrize("positions", ["last", "mean", "all", 0])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_passes_do_not_change_a_number(family, positions):
    host = as_host(models.hf(family), tokenizer=models.tokenizer())
    alone = esl.capture(host.model, TEXTS, HOOKS, positions=positions, batch_size=1)
    for changes in ({}, {"batch_size": 16}, {"tokens_per_pass": 64}):
        store = esl.capture(host.model, TEXTS, HOOKS, positions=positions, **changes)
        for name in HOOKS:
            scale = alone[name].norm(dim=1).max()
            assert float((store[name] - alone[name]).norm(dim=1).max() / scale) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["last", "mean", "all", 0, -2])
def test_a_picker_picks_what_take_positions_takes(positions, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 7, 3, generator=generator).to(dtype)
    mask = torch.arange(7)[None] < torch.tensor([[7], [2], [5], [3]])
    picker = RowPicker(positions, mask)
    rows = picker.rows(values)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, take_rows(values, positions, mask), atol=1e-6, rtol=1e-6)
    assert torch.equal(picker.tokens(values[..., 0]), values[..., 0][mask])
    values.zero_()
    assert rows.abs().sum() > 0  # copies


def test_a_picker_refuses_what_is_not_there():
    mask = torch.tensor([[1, 1], [1, 0]])
    with pytest.raises(DataError, match="positions=1 is outside prompt 1, which has 1 tokens"):
        RowPicker(1, mask)
    with pytest.raises(ArgumentError, match="positions must be"):
        RowPicker("first", mask)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_head_of_a_bridge_is_applied_where_logits_are_read(family):
    host = as_host(models.bridge(family))
    batch = host.tokenize(["the cat was happy", "a dog"])
    where = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    where[0, 1] = where[1, 2] = True
    full = host.forward(batch)
    # A product of fewer rows may be rounded in another way.
    torch.testing.assert_close(host.logits_at(batch, where), full[where], atol=1e-5, rtol=1e-5)
    heard: list[torch.Size] = []
    with host.intervene({"unembed.hook_in": lambda x: heard.append(x.shape)}):
        assert torch.equal(host.logits_at(batch, where), full[where])
    assert heard == [torch.Size([2, batch.input_ids.shape[1], models.D_MODEL])]
