"""Shared fixtures. The array shapes that the package annotates are checked by beartype here and
nowhere else (see `typechecking`)."""

from __future__ import annotations

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that loads a multimodal model must not have TransformerLens install torchvision, and with
# it another torch, into the environment that the tests are running in.
os.environ["PIP_NO_INDEX"] = os.environ["UV_OFFLINE"] = "1"

import pytest
import torch
import typechecking  # before nnsight, which gives every object a method that beartype cannot digest at import
from jaxtyping import install_import_hook

install_import_hook(typechecking.modules(), "typechecking.checked")

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
