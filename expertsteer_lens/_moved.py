"""Where the modules and public names of version 0.1 are now: the old ways still work, modules and
renamed names with a warning.

To be removed, with the calls in `__init__` and the end of its stub, in the release after the next.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any

MODULES = {
    "activations": "data.activations",
    "aligners": "align",
    "bench": "benchmarks.offline",
    "calibration": "measure.calibration",
    "chat": "data.chat",
    "contrast": "data.contrast",
    "directions": "learn.directions",
    "edits": "interventions.edits",
    "export": "files.export",
    "fitted": "pipeline.fitted",
    "gates": "interventions.gates",
    "gram": "linalg.row_space",
    "io": "files.io",
    "kernels": "linalg.kernels",
    "metrics": "measure.metrics",
    "moments": "linalg.moments",
    "mutual_information": "pair",
    "pairing": "pair",
    "plan": "steer.plan",
    "plots": "show.plots",
    "positions": "interventions.positions",
    "presets": "benchmarks.public",
    "report": "show.report",
    "rfm": "learn.rfm",
    "steering": "steer.run",
}
"""Old name below the package, and the module that has its public names now."""
NAMES = {
    "Bench": "benchmarks.Bench",
    "Calibration": "measure.Calibration",
    "LayerPairMI": "pair.LayerPairMI",
    "LayerPairs": "pair.LayerPairs",
    "presets": "benchmarks",
    "run_bench": "benchmarks.run_bench",
}
"""Public names of `expertsteer_lens` that have another name now: where each is."""
IN_FOLDERS = {
    "Aligner": "align",
    "Evaluation": "evaluation",
    "ExpertSteering": "pipeline",
    "Gate": "interventions",
    "Host": "hosts",
    "RFM": "learn",
    "RunReport": "steer",
    "SteeringVector": "steer",
    "calibrate": "measure",
    "capture_tensors": "hosts",
    "edits": "interventions",
    "fit_gate": "interventions",
    "plots": "show",
}
"""Names that were public in `expertsteer_lens` itself and are in a folder of it: `esl.Gate` is
`expertsteer_lens.interventions.Gate`. The short way still works, without a warning, and is not
listed."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name and hands out the one that took its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Where an old name's module is now, as Python's import asks; None for any other name."""
        package, _, name = fullname.rpartition(".")
        if package != __package__ or name not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An empty module, in whose place `exec_module` puts the one that has the names now."""
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that has the names now under the old name: Python's import hands out what
        stands there in the end, so there is one of each module and of each class."""
        old = module.__name__.rpartition(".")[2]
        new = f"{__package__}.{MODULES[old]}"
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Make the old names importable."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def lookup(name: str) -> Any:
    """A public name that is elsewhere now, with a warning."""
    place = NAMES[name]
    module, _, attribute = place.rpartition(".")
    warnings.warn(f"esl.{name} is now {__package__}.{place}", DeprecationWarning, stacklevel=3)
    if not module:
        return importlib.import_module(f"{__package__}.{attribute}")
    return getattr(importlib.import_module(f"{__package__}.{module}"), attribute)


class Renamed:
    """An attribute of a class under the name it had before: still read, with a warning.

    Example:
        >>> class Circle:
        ...     radius = 2.0
        ...     size = Renamed("radius")
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     Circle().size
        2.0
    """

    def __init__(self, new: str) -> None:
        self.new, self.old = new, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        message = f"{owner.__name__}.{self.old} is now {owner.__name__}.{self.new}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return attrgetter(self.new)(instance)
