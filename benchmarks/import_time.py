"""How long `import expertsteer_lens` takes, beside `import torch` and jaxtyping, without which it is
nothing: processor time of fresh interpreters, in turn, so that both meet the same machine.

    python benchmarks/import_time.py --repeats 9
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

STATEMENTS = {
    "torch and jaxtyping": "import torch, jaxtyping",
    "expertsteer_lens": "import expertsteer_lens",
}


def seconds(statement: str) -> float:
    """Processor time of one interpreter that runs a statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the median of each and what the package adds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    for statement in STATEMENTS.values():  # files into the cache of the machine
        seconds(statement)
    pairs = [[seconds(s) for s in STATEMENTS.values()] for _ in range(repeats)]
    for name, times in zip(STATEMENTS, zip(*pairs, strict=True), strict=True):
        print(f"{name:20} {statistics.median(times):.2f} s")
    print(f"the package adds     {statistics.median(two / one - 1 for one, two in pairs):+.1%}")


if __name__ == "__main__":
    main()
