"""The benchmark on real models: `bench_transfer` measures what an expert gives a target."""

from __future__ import annotations

from .config import TransferConfig
from .result import TransferBench
from .run import bench_transfer
from .tasks import Answered, TransferTask

__all__ = ["Answered", "TransferBench", "TransferConfig", "TransferTask", "bench_transfer"]
