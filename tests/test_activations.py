"""Stores of activations: what they take and refuse, and what is read out of a cache."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from expertsteer_lens.data.activations import ActivationStore, layer_of, layer_or_none
from expertsteer_lens.data.read_positions import take_positions
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError

HOOK, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
ROWS = torch.arange(12.0).view(4, 3)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (HOOK, 0),
        ("blocks.11.attn.hook_z", 11),
        ("expert.3.states", 3),
        ("3.out", 3),
        ("conv2.hook_out", None),
        ("hook_embed", None),
        ("ln_final.hook_normalized", None),
        ("layer.4", None),
    ],
)
def test_the_layer_of_a_hook_name(name: str, layer: int | None) -> None:
    assert layer_or_none(name) == layer
    if layer is None:
        with pytest.raises(ArgumentError, match="carries no layer index"):
            layer_of(name)
    else:
        assert layer_of(name) == layer


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        [
            [1, 0, 0, 1],
            [1, -1, 1, 1],
            [True, False, True, True],
            torch.tensor([0.0, 1.0, 0.0, 1.0]),
            [1, 1, 1, 1],
        ],
    )
    def test_classes_are_stored_as_they_are(self, labels: Any) -> None:
        got = ActivationStore({HOOK: ROWS}, labels).labels
        assert torch.equal(got, torch.as_tensor(labels))
        assert got.dtype == torch.as_tensor(labels).dtype

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([7, -3, 7, 7], r"labels must be 0/1, -1/\+1 or bool, got values \[-3.0, 7.0\]"),
            ([0, 1, -1, 1], "must be 0/1, -1/"),
            ([1, float("nan"), 0, 1], "labels holds NaN in row 1"),
            (["yes", "no", "no", "no"], "got list that is no list of numbers"),
            ([1, None, 0, 1], "got list that is no list of numbers"),
            ({"a": 1}, "got dict that is no list of numbers"),
            ([1, 0], r"one label per row: expected shape \(4,\), got \(2,\)"),
            ([[1], [0], [0], [1]], r"expected shape \(4,\), got \(4, 1\)"),
        ],
    )
    def test_what_is_no_class_is_refused(self, labels: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            ActivationStore({HOOK: ROWS}, labels)

    def test_capture_refuses_them_before_the_model_runs(self) -> None:
        from expertsteer_lens.hosts import as_host, capture

        host = as_host(models.hf("llama"), tokenizer=models.tokenizer())
        host.forward = None  # type: ignore[method-assign, assignment]
        for labels in ([7, -3], [float("nan"), 1], ["a", "b"], [1]):
            with pytest.raises(DataError, match="labels"):
                capture(host, ["the cat", "a dog"], labels=labels)


class TestSelect:
    def test_rows_by_index_and_by_mask(self) -> None:
        store = ActivationStore({HOOK: ROWS}, [1, 0, 0, 1])
        assert torch.equal(store.select([3, 0, -2])[HOOK], ROWS[[3, 0, 2]])
        assert torch.equal(store.select(store.labels > 0)[HOOK], ROWS[[0, 3]])
        assert store.select(range(2)).labels.tolist() == [1, 0]

    @pytest.mark.parametrize("rows", [[10**6], [-5], [0.5], [True, False], [[0, 1]], 0])
    def test_rows_that_are_none_are_refused(self, rows: Any) -> None:
        with pytest.raises(ArgumentError, match=r"rows must be indices below n=4 or a mask"):
            ActivationStore({HOOK: ROWS}).select(rows)


class TestFromCache:
    CACHE = {  # noqa: RUF012
        "hook_embed": torch.zeros(2, 3, 4),
        HOOK: torch.arange(24.0).view(2, 3, 4),
        LATER: -torch.arange(24.0).view(2, 3, 4),
    }

    def test_the_last_tokens_of_every_block(self) -> None:
        store = ActivationStore.from_cache(self.CACHE, labels=torch.tensor([1, 0]))
        assert store.hook_names == [HOOK, LATER]
        assert torch.equal(store[HOOK], self.CACHE[HOOK][:, -1])
        assert store.labels.tolist() == [1, 0]
        assert store.provenance == {"source": "cache", "positions": "last"}

    def test_padding_is_not_counted(self) -> None:
        mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
        got = {
            p: ActivationStore.from_cache(self.CACHE, [HOOK], positions=p, attention_mask=mask)[
                HOOK
            ]
            for p in ("last", "mean", 0)
        }
        x = self.CACHE[HOOK]
        assert torch.equal(got["last"], torch.stack([x[0, 2], x[1, 1]]))
        assert torch.equal(got[0], torch.stack([x[0, 1], x[1, 0]]))
        torch.testing.assert_close(got["mean"], torch.stack([x[0, 1:].mean(0), x[1, :2].mean(0)]))

    def test_the_cache_may_change_afterwards(self) -> None:
        cache = {HOOK: torch.ones(2, 3, 4)}
        store = ActivationStore.from_cache(cache, positions=0)
        cache[HOOK].zero_()
        assert (store[HOOK] == 1).all()

    def test_errors(self) -> None:
        with pytest.raises(HookNameError, match=r"blocks\.7.*an activation cache.*closest"):
            ActivationStore.from_cache(self.CACHE, ["blocks.7.hook_resid_post"])
        with pytest.raises(DataError, match="hook_names must be a list of hook names, got one str"):
            ActivationStore.from_cache(self.CACHE, HOOK)
        with pytest.raises(DataError, match="cache holds no 'hook_resid_post'"):
            ActivationStore.from_cache({"hook_embed": torch.zeros(1, 1, 1)})
        with pytest.raises(DataError, match=r"positions=5 is outside prompt 0, which has 3 tokens"):
            ActivationStore.from_cache(self.CACHE, positions=5)

    def test_a_transformer_lens_cache_gives_what_capture_reads(self) -> None:
        from expertsteer_lens.hosts import capture

        bridge = models.bridge("llama")
        tokens = torch.tensor([[1, 7, 8, 9]])
        _, cache = bridge.run_with_cache(tokens)
        store = ActivationStore.from_cache(cache)
        text = bridge.tokenizer.decode(tokens[0, 1:])
        wanted = capture(bridge, [text])
        assert store.hook_names == wanted.hook_names
        for name in store:
            torch.testing.assert_close(store[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_all_tokens_prompt_after_prompt() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(take_positions(x, "all", mask), torch.cat([x[0, :2], x[1]]))
    with pytest.raises(ArgumentError, match="positions must be 'last'"):
        take_positions(x, "first")
    with pytest.raises(DataError, match="attention_mask must have shape"):
        take_positions(x, "last", mask[:1])
