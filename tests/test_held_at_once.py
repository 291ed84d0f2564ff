"""What a fit holds at once does not grow with the number of layers more than its documents say."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import expertsteer_lens as esl
from expertsteer_lens.align import AlignerGrid, MomentGrid, PairedMoments, moment_grid
from expertsteer_lens.linalg.moments import RunningMoments
from expertsteer_lens.pair import layer_pair_mi
from expertsteer_lens.pair.preparation import prepare_layer
from expertsteer_lens.pipeline.maps import _Stacked

LAYERS, N, D = 6, 40, 5


class Watched(Mapping[str, Tensor]):
    """States that are made when they are asked for, as a folder's are; knows how many live."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = {f"{i}": torch.randn(N, D, generator=generator) for i in range(LAYERS)}
        self.alive = self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        rows = self.rows[name].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(rows, self._gone)
        return rows

    def _gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return LAYERS

    def __contains__(self, name: object) -> bool:
        return name in self.rows


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_scores_of_layer_pairs_hold_one_layer_of_states(one_thread):
    sides = Watched(0), Watched(1)
    config = esl.MIConfig(n_permutations=2, n_bootstrap=4, n_components=2)
    lazily = layer_pair_mi(*sides, config)
    assert max(side.most for side in sides) <= 3 < LAYERS
    at_once = layer_pair_mi(*(side.rows for side in sides), config)
    assert torch.equal(lazily.matrix, at_once.matrix)


def test_a_grid_of_maps_holds_one_layer_of_states():
    expert, target = Watched(0), Watched(1)
    grid = AlignerGrid(target, esl.AlignerConfig(kind="ridge"))
    for name in expert:
        grid.fit(expert, pairs=[(name, t) for t in target])
    assert max(expert.most, target.most) <= 2


def test_anchors_and_pairs_are_put_together_layer_by_layer():
    parts = Watched(0), Watched(1)
    stacked = _Stacked(*parts)
    assert list(stacked) == list(parts[0])
    assert len(stacked) == LAYERS
    assert "0" in stacked
    assert "x" not in stacked
    assert parts[0].most == 0
    assert torch.equal(stacked["3"], torch.cat([part.rows["3"] for part in parts]))
    assert parts[0].alive == 0


def test_moments_are_not_copied_as_a_whole_and_target_layers_are_prepared_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    expert = {name: torch.randn(N, D, generator=generator) for name in "ab"}
    target = {name: torch.randn(N, D - 1, generator=generator) for name in "xy"}
    pairs = [(e, t) for e in expert for t in target]
    moments = PairedMoments(pairs, d_expert=D, d_target=D - 1)
    moments.update(expert, target, torch.arange(N) // 2)
    wanted = moment_grid.fit_aligner_grid_from_moments(moments)
    prepared, layer = [], moment_grid.target_layer
    monkeypatch.setattr(RunningMoments, "result", None)
    monkeypatch.setattr(
        moment_grid, "target_layer", lambda *a, **k: prepared.append(1) or layer(*a, **k)
    )
    grid = MomentGrid(moments)
    found = grid.fit(pairs[:2]) | grid.fit(pairs[2:])
    assert len(prepared) == len(target)
    for pair in pairs:
        assert torch.equal(
            found[pair].encode(expert[pair[0]]), wanted[pair].encode(expert[pair[0]])
        )


class Largest(TorchDispatchMode):
    """Knows how many numbers the largest tensor had that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.itemsize)
        return out


@pytest.mark.parametrize("part", ["maps", "scores", "direction"])
def test_with_fewer_rows_than_the_width_nothing_is_as_large_as_its_square(part, one_thread):
    n, d = 24, 400
    generator = torch.Generator().manual_seed(0)
    expert, target = ({"0": torch.randn(n, d, generator=generator)} for _ in range(2))
    labels = torch.arange(n) % 2
    run = {
        "maps": lambda: AlignerGrid(target, esl.AlignerConfig(kind="anchored_autoencoder")).fit(
            expert
        ),
        # The rest of the scores is of the components; it runs in threads, which are not watched.
        "scores": lambda: prepare_layer("expert", expert["0"], esl.MIConfig(), 8.0),
        "direction": lambda: esl.fit_rfm(expert["0"], labels),
    }[part]
    with Largest() as largest:
        run()
    assert n * d <= largest.numel < 4 * n * d < d * d
