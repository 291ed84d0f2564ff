"""Many small matrices on a CPU: one thread per core, each with single-threaded torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def parallel_map(
    device: torch.device,
) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]]:
    """An ordered `map`: on a CPU over one thread per core, each with single-threaded torch;
    elsewhere the plain one.

    LAPACK takes the many small matrices here one at a time, and torch's own threads inside short
    operations cost more than they give. The number of threads torch uses is as before when the
    block ends."""
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        # A worker's setting is also the default of threads born later; this puts the caller's back.
        torch.set_num_threads(threads)
