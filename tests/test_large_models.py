"""What keeps a fit on large models within memory and time: bounded passes, work that is not done
twice."""

from __future__ import annotations

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.align import AlignerConfig, AlignerGrid, fit_aligner_grid, moment_kind
from expertsteer_lens.hosts import Host
from expertsteer_lens.pair.rules import allowed_targets

SMALL = esl.ExpertSteerConfig(
    mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
    rfm=esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0, n_rounds=1),
    batch_size=4,
    pair_tokens=False,
)


def layers_decomposed(monkeypatch) -> list[str]:
    """Name of every layer whose rows are reduced to sums, in order."""
    calls: list[str] = []
    real = moment_kind.sums_from_rows
    monkeypatch.setattr(
        moment_kind, "sums_from_rows", lambda name, *rest: calls.append(name) or real(name, *rest)
    )
    return calls


@pytest.mark.parametrize("kind", ["anchored_autoencoder", "ridge", "procrustes", "autoencoder"])
def test_layers_decomposed_once_give_the_same_maps(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    expert, target = (
        {f"blocks.{i}.hook_resid_post": torch.randn(30, d, generator=generator) for i in range(3)}
        for d in (7, 5)
    )
    config = AlignerConfig(kind=kind)
    whole = fit_aligner_grid(expert, target, config, seed=1)
    calls = layers_decomposed(monkeypatch)
    grid = AlignerGrid(target, config, seed=1)
    for e in expert:
        for (_, t), found in grid.fit(expert, pairs=[(e, t) for t in target]).items():
            assert torch.equal(found.encoder.weight, whole[e, t].encoder.weight)
            assert torch.equal(found.decoder.bias, whole[e, t].decoder.bias)
    n_targets = sum(name.startswith("target[") for name in calls)
    assert n_targets == (0 if kind == "autoencoder" else 3)


@pytest.fixture(scope="module")
def texts():
    return {"pairs": esl.zoo.contrast_pairs(n=12), "anchors": esl.zoo.anchors(n=40)}


def passes_with_gradients(monkeypatch) -> list[int]:
    """Rows of every forward pass that keeps its graph."""
    sizes: list[int] = []
    for host in {type(esl.as_host(esl.zoo.load("target"))), Host}:
        if "forward" in vars(host):
            real = host.forward

            def forward(self, batch, *args, real=real, **keywords):
                if torch.is_grad_enabled():
                    sizes.append(len(batch.input_ids))
                return real(self, batch, *args, **keywords)

            monkeypatch.setattr(host, "forward", forward)
    return sizes


def test_the_batch_size_bounds_the_backward_passes_of_the_attribution(texts, monkeypatch):
    sizes = passes_with_gradients(monkeypatch)
    full = esl.zoo.behaviour(n=8)
    behaviour = esl.Behaviour(full.prompts, full.positive[:1], full.negative[:1])
    expert, target = esl.zoo.load_pair()
    esl.ExpertSteer(SMALL).fit(
        expert,
        target,
        texts["pairs"],
        anchors=texts["anchors"],
        behaviour=behaviour,
        progress=False,
    )
    assert sizes == [4, 4]  # 4 validation prompts of two completions
    sizes.clear()
    esl.ExpertSteer(SMALL).fit(
        expert, target, texts["pairs"], anchors=texts["anchors"], progress=False
    )
    assert sizes == [4, 2]  # 6 calibration texts


def test_a_fit_decomposes_every_target_layer_once(texts, monkeypatch):
    calls = layers_decomposed(monkeypatch)
    expert, target = esl.zoo.load_pair()
    fit = esl.ExpertSteer(SMALL).fit(
        expert,
        target,
        texts["pairs"],
        anchors=texts["anchors"],
        progress=False,
        on_step=lambda step: calls.clear() if step["step"] == "capture" else None,
    )
    assert len(calls) == len(set(calls))
    n_allowed = len(allowed_targets(len(fit.target_pairs), SMALL.pairing))
    assert sum(name.startswith("target[") for name in calls) == n_allowed
