"""A capture shared by several processes: each writes a store of its own beside the whole one, and
one of them, or anybody later, puts the whole together, bit for bit what one process writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from expertsteer_lens._atomic import check_place
from expertsteer_lens.errors import ArgumentError, ArtifactError

from .capture_plan import CapturePlan, starts_of
from .states_folder import StatesFile, files_of, map_file, open_folder, read_index
from .states_writer import writing

Shard = tuple[int, int]
_RANK, _N_RANKS = "RANK", "WORLD_SIZE"
_LAUNCHERS = (
    (_RANK, _N_RANKS),
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
"""Where torchrun and `accelerate launch`, and the MPIs that the latter uses on CPUs, say it."""


def shard_of(shard: Shard | Literal["auto"] | None) -> Shard | None:
    """Number of this process and how many there are; None for one that does everything.

    "auto" reads what `accelerate launch` and `torchrun` say in the environment.

    Raises:
        ArgumentError: neither "auto" nor two integers; the environment says half of it.
    """
    if shard == "auto":
        for names in _LAUNCHERS:
            said = {name: os.environ.get(name) for name in names}
            if set(said.values()) != {None}:
                break
        else:
            return None
        try:
            number, of = (int(str(value)) for value in said.values())
        except ValueError:
            raise ArgumentError(
                f"shard='auto' reads the environment, which says {said}; start with "
                "accelerate launch or torchrun, or give shard=(process, processes)."
            ) from None
        return None if of == 1 else (number, of)
    if shard is None:
        return None
    if not isinstance(shard, tuple) or len(shard) != 2 or not all(type(i) is int for i in shard):
        raise ArgumentError(
            f"shard must be 'auto' or (process, processes), such as (0, 2); got {shard!r}."
        )
    return shard


def shard_folder(store: str | Path, shard: Shard) -> Path:
    """Where a process writes: beside the store.

    >>> shard_folder("states", (0, 2)).name
    'states.shard-0-of-2'
    """
    path = Path(store)
    return path.with_name(f"{path.name}.shard-{shard[0]}-of-{shard[1]}")


def merge_shards(store: str | Path, medians: Any) -> None:
    """Write the whole store from what the processes wrote; see `ActivationStore.merge`.

    Args:
        store: the folder that the processes were given.
        medians: makes provenance of the norms of all tokens.
    """
    check_place(store)
    folders = _shards_beside(Path(store))
    indices = [read_index(folder) for folder in folders]
    for index, folder in zip(indices, folders, strict=True):
        if not index.get("complete"):
            raise ArtifactError(
                f"{folder} is not complete; run the capture of this process again with the same "
                "arguments, and it goes on."
            )
    wholes: list[dict[str, Any]] = [index.get("whole") or {} for index in indices]
    first = wholes[0]
    other = [k for k in first if any(w.get(k) != first[k] for w in wholes)]
    if other or not first:
        raise ArtifactError(
            f"the shards of {str(store)!r} are of different captures: their {', '.join(other)} "
            "differ; capture those again that are not of this one."
        )
    try:
        plan = CapturePlan.from_json(first)
        shards = [
            _WrittenShard(folder, index, plan.share(number, len(folders)))
            for number, (folder, index) in enumerate(zip(folders, indices, strict=True))
        ]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(f"a shard of {str(store)!r} lacks what it needs: {error!r}.") from error
    with writing(store, plan) as writer:
        if writer.is_complete:
            return
        for number in range(len(plan.batches)):
            if number not in writer.done:
                share, its = number % len(shards), number // len(shards)
                writer.write(number, *shards[share].batch(its))
        writer.finish(medians(writer.norms()))


def _shards_beside(store: Path) -> list[Path]:
    found: dict[Shard, Path] = {}
    for path in store.parent.glob(f"{_escaped(store.name)}.shard-*-of-*"):
        match = re.fullmatch(r".*\.shard-(\d+)-of-(\d+)", path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    numbers = sorted({of for _, of in found})
    if len(numbers) != 1:
        raise ArtifactError(
            f"beside {str(store)!r} there are {'no shards' if not numbers else 'shards'}"
            f"{'' if not numbers else f' of {numbers} processes, of which one may be left'}: "
            "folders such as "
            f"{shard_folder(store, (0, 2)).name!r}, which capture(..., shard=) writes."
        )
    (of,) = numbers
    missing = [str(shard_folder(store, (i, of))) for i in range(of) if (i, of) not in found]
    if missing:
        raise ArtifactError(f"shards are missing: {', '.join(missing)}.")
    return [found[i, of] for i in range(of)]


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


class _WrittenShard:
    """What one process wrote."""

    def __init__(self, folder: Path, index: Mapping[str, Any], plan: CapturePlan) -> None:
        self._states, _, _ = open_folder(folder)  # checks the files as they are first asked for
        self._plan, self._folder = plan, folder
        self._files: dict[str, StatesFile] = files_of(index)
        self._row_starts = starts_of(plan.row_counts)
        self._norm_starts = starts_of(plan.norm_counts or [])
        self._norms: dict[str, Tensor] = {}

    def batch(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """States and norms of a batch, as the process gave them to its writer."""
        plan, prompts = self._plan, self._plan.batches[number]
        states = {
            name: _rows(self._states[name], prompts, self._row_starts, plan.row_counts)
            for name in self._files
        }
        if plan.norm_counts is None:
            return states, None
        for name, file in self._files.items():
            if name not in self._norms:
                content = map_file(self._folder, file)
                self._norms[name] = torch.frombuffer(
                    content, dtype=torch.float32, count=file.n_norms, offset=file.norms_at(0)
                )
        counts, starts = plan.norm_counts, self._norm_starts
        return states, {n: _rows(v, prompts, starts, counts) for n, v in self._norms.items()}


def _rows(values: Tensor, prompts: list[int], starts: list[int], counts: list[int]) -> Tensor:
    return torch.cat([values[starts[p] : starts[p] + counts[p]] for p in prompts])
