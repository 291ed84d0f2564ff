"""Old module paths of version 0.1.0 lead to the same classes, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import expertsteer_lens as esl
from expertsteer_lens import _moved


@pytest.mark.parametrize("old", sorted(_moved.MODULES))
def test_a_module_is_found_under_its_old_name_with_a_warning(old):
    sys.modules.pop(f"expertsteer_lens.{old}", None)
    with pytest.warns(
        DeprecationWarning, match=rf"expertsteer_lens\.{old} is now expertsteer_lens\."
    ):
        module = importlib.import_module(f"expertsteer_lens.{old}")
    new = importlib.import_module(f"expertsteer_lens.{_moved.MODULES[old]}")
    assert module is new
    assert getattr(esl, old) is new or old in _moved.NAMES


def test_the_usual_imports_of_0_1_0_give_todays_classes():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import expertsteer_lens as esl\n"
        "from expertsteer_lens.aligners import AlignerConfig, fit_aligner_grid\n"
        "from expertsteer_lens.mutual_information import LayerPairMI, layer_pair_mi\n"
        "from expertsteer_lens.pairing import PairingConfig, select_layer_pairs\n"
        "from expertsteer_lens.plan import SteeringPlan\n"
        "from expertsteer_lens.evaluation import Evaluation, EvaluationRow, evaluate\n"
        "from expertsteer_lens.pipeline import ExpertSteer, ExpertSteerConfig\n"
        "from expertsteer_lens.hosts.loading import load_model\n"
        "import expertsteer_lens.metrics\n"
        "assert esl.AlignerConfig is AlignerConfig and esl.SteeringPlan is SteeringPlan\n"
        "assert esl.ExpertSteer is ExpertSteer and esl.evaluate is evaluate\n"
        "assert callable(expertsteer_lens.metrics.behaviour_metric)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_renamed_public_name_says_its_new_one():
    vars(esl).pop("presets", None)  # where an import of the old module left it
    with pytest.warns(
        DeprecationWarning, match=r"esl\.presets is now expertsteer_lens\.benchmarks"
    ):
        assert esl.presets is esl.benchmarks


def test_a_module_that_never_was_is_still_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("expertsteer_lens.alingers")


def test_an_old_name_that_nnsight_puts_on_every_object_is_still_ours():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import nnsight, expertsteer_lens as esl\n"
        "from expertsteer_lens.io import save\n"
        "assert save is esl.save\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
