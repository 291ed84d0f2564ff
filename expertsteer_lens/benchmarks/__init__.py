"""Public benchmarks by name (`names`, `get`, `load`), and the offline benchmark (`run_bench`)."""

from __future__ import annotations

from .offline import Bench, run_bench
from .public import get, load, names

__all__ = ["Bench", "get", "load", "names", "run_bench"]
