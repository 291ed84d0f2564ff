"""Shared fixtures. The shapes annotated in the inner mathematics are checked by beartype here and
nowhere else."""

from __future__ import annotations

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import typechecking  # noqa: F401 - before nnsight, which gives every object a method that beartype cannot digest at import
from jaxtyping import install_import_hook

# The inner mathematics only: public functions refuse bad shapes themselves, with messages that are
# tested.
INNER = (
    "learn.recursion",
    "learn.rows",
    "align.fold_sums",
    "align.folds",
    "pair.cca",
    "pair.gaussian",
    "pair.ksg",
    "pair.cka",
    "pair.preparation",
)
install_import_hook([f"expertsteer_lens.{name}" for name in INNER], "typechecking.checked")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Folder with the two real trained models and real data; absent outside the development
    machines."""
    if not (SHARED / "models").is_dir():
        pytest.skip("the folder ../shared with real models and data is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
