"""Networks with hook points that are no language models: captured and steered through tensors."""

from __future__ import annotations

import doctest
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from expertsteer_lens.errors import (
    ArgumentError,
    DataError,
    HookNameError,
    HostError,
    InterventionError,
    ModelStateError,
)
from expertsteer_lens.hosts import as_host, capture, capture_tensors, hooked_module
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.steer.plan import SteeringPlan

HookPoint = pytest.importorskip("transformer_lens.hook_points").HookPoint
HookedRootModule = pytest.importorskip("transformer_lens.HookedRootModule").HookedRootModule
V = torch.tensor([3.0, 0.0, 4.0, 0.0]) / 5


class Patches(HookedRootModule):
    """Sees images `[batch, 3, 8]` as 8 patches, mixes them, and reads out the mean: every step is
    linear but one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.hook_embed, self.hook_mix, self.hook_pooled = HookPoint(), HookPoint(), HookPoint()
        self.setup()

    def forward(self, images: Tensor, *, twice: bool = False, skip: bool = False) -> Tensor:
        x = self.hook_embed(self.embed(images.transpose(1, 2)))
        if not skip:
            x = self.hook_mix(torch.tanh(self.mix(x)))
            x = self.hook_mix(x) if twice else x
        return self.head(self.hook_pooled(x.mean(1)))


@pytest.fixture
def network() -> Any:
    return Patches().eval()


IMAGES = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))


def plan(hook: str = "hook_mix", **options: Any) -> SteeringPlan:
    return SteeringPlan.from_vectors({hook: V}, coefficient=2.0, relative_to="unit", **options)


def test_it_is_recognised_by_its_hook_points_and_says_that_it_reads_no_texts(network: Any) -> None:
    host = as_host(network)
    assert host.kind == "hooked_module"
    assert host.basis == "raw"
    assert repr(host).endswith("Patches, because it has hook_dict, and no vocabulary")
    with pytest.raises(
        HostError, match="'Patches' is no language model and takes no texts; use capture_tensors"
    ):
        capture(network, ["the cat"], ["hook_mix"])
    with pytest.raises(HostError, match="takes no tokens; run it yourself"):
        host.forward(None)
    with pytest.raises(ArgumentError, match="tokenizer cannot be given for a Patches"):
        as_host(network, tokenizer=models.tokenizer())
    assert (
        host.fingerprint
        == as_host(Patches().eval()).fingerprint
        != as_host(Patches(1).eval()).fingerprint
    )


def test_what_is_captured_is_what_the_network_computes(network: Any) -> None:
    with torch.no_grad():
        embedded = network.embed(IMAGES.transpose(1, 2))
        mixed = torch.tanh(network.mix(embedded))
    names = ["hook_embed", "hook_mix", "hook_pooled"]
    for inputs in (IMAGES, (IMAGES,), {"images": IMAGES}, [IMAGES[:2], (IMAGES[2:],)]):
        store = capture_tensors(network, inputs, names[:2], labels=[i // 8 % 2 for i in range(40)])
        torch.testing.assert_close(store["hook_embed"], embedded.reshape(40, 4))
        torch.testing.assert_close(store["hook_mix"], mixed.reshape(40, 4))
        assert store.labels is not None
    rows = capture_tensors(network, IMAGES, names, positions="mean", labels=[0, 1, 0, 1, 0])
    torch.testing.assert_close(
        rows["hook_mix"], rows["hook_pooled"]
    )  # the pooled activation is [batch, d]
    torch.testing.assert_close(
        capture_tensors(network, IMAGES, ["hook_mix"], positions=2)["hook_mix"], mixed[:, 2]
    )
    assert rows.provenance["name"] == "Patches"


@pytest.mark.parametrize(
    "edit", ["add", "add_relative", "add_contextual", "ablate", "clamp", "rescale"]
)
def test_steering_is_the_edit_at_the_places_asked_for(network: Any, edit: str) -> None:
    with torch.no_grad():
        mixed = torch.tanh(network.mix(network.embed(IMAGES.transpose(1, 2))))
    along = (mixed @ V)[..., None]
    wanted = {"add": mixed + 2 * V, "ablate": mixed - along * V, "rescale": mixed + along * V}
    wanted["clamp"] = mixed + (along.clamp(min=0.3) - along) * V
    wanted["add_relative"] = mixed + mixed.norm(dim=-1, keepdim=True) * V
    own = models.edit_parameters(edit, d=mixed.shape[-1])
    if own:
        wanted[edit] = mixed + (own["bias"] + mixed @ own["weights"])[..., None] * V
    strength = {"add": 2.0, "clamp": 0.3}.get(edit, 1.0)
    chosen = torch.tensor([False, True, False, True, False, False, False, False])
    want = torch.where(chosen[:, None], wanted[edit], mixed)
    steer = SteeringPlan.from_vectors(
        {"hook_mix": V},
        coefficient=strength,
        relative_to="unit",
        edit=edit,
        positions=[1, 3],
        parameters={"hook_mix": own},
    )
    before = network(IMAGES)
    with steer.hooks(network) as report, torch.no_grad():
        seen: list[Tensor] = []
        network.hook_mix.add_hook(lambda x, hook: seen.append(x.clone()))
        torch.testing.assert_close(network(IMAGES), network.head(want.mean(1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[0], want, atol=1e-6, rtol=0)
    assert report.n_edited == {"hook_mix": 10}
    assert report.n_forwards == 1
    network.reset_hooks()
    assert torch.equal(network(IMAGES), before)


def test_a_gate_may_be_read_at_another_hook_point_without_a_layer(network: Any) -> None:
    def gated(read: str, act: str) -> SteeringPlan:
        gate = Gate(direction=V, threshold=0.0, hook_name=read, per="token")
        return SteeringPlan.from_vectors({act: V}, coefficient=2.0, relative_to="unit", gate=gate)

    with torch.no_grad():
        embedded = network.embed(IMAGES.transpose(1, 2))
        mixed = torch.tanh(network.mix(embedded))
        opens = (embedded @ V >= 0)[..., None]
        with gated("hook_embed", "hook_mix").hooks(network) as report:
            after = network(IMAGES)
    want = network.head((mixed + 2 * V * opens).mean(1))
    torch.testing.assert_close(after, want, atol=1e-6, rtol=0)
    assert report.n_edited == {"hook_mix": int(opens.sum())}
    assert 0 < int(opens.sum()) < opens.numel()
    with pytest.raises(InterventionError, match="the gate of 'hook_embed' was not reached"):
        with gated("hook_mix", "hook_embed").hooks(network):
            network(IMAGES)


def test_a_pooled_activation_is_one_place_and_rows_have_their_own_strength(network: Any) -> None:
    factors = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    before = network(IMAGES)
    with plan("hook_pooled").hooks(network, row_coefficients=factors) as report:
        after = network(IMAGES)
    torch.testing.assert_close(
        after - before, 2 * factors[:, None] * (network.head.weight @ V), atol=1e-6, rtol=0
    )
    assert torch.equal(after[0], before[0])
    assert report.n_edited == {"hook_pooled": 4}


def test_a_vector_learnt_from_captures_moves_the_output_by_the_closed_form_and_random_ones_less(
    network: Any,
) -> None:
    """Regressing the output on what is captured finds the read-out weights w; steering along them
    adds strength * |w|."""
    images = torch.randn(64, 3, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs, w = network(images)[:, :1], network.head.weight[0]
        rows = capture_tensors(network, images, ["hook_pooled"])["hook_pooled"]
        found = torch.linalg.lstsq(
            (rows - rows.mean(0)).double(), (outputs - outputs.mean(0)).double()
        ).solution[:, 0]
        steer = SteeringPlan.from_vectors(
            {"hook_pooled": found}, coefficient=2.0, relative_to="unit"
        )
        effects = []
        for one in (steer, *(steer.with_random_directions(seed=seed) for seed in range(20))):
            with one.hooks(network):
                effects.append(float((network(images)[:, :1] - outputs).mean()))
    assert effects[0] == pytest.approx(2.0 * float(w.detach().norm()), rel=1e-4)
    assert effects[0] > 1.02 * max(map(abs, effects[1:]))


def test_a_network_that_never_reaches_the_hook_or_is_not_run_is_an_error(network: Any) -> None:
    with pytest.raises(InterventionError, match=r"\['hook_mix'\] never fired"):
        with SteeringPlan(vectors=plan().vectors + plan("hook_embed").vectors).hooks(network):
            network(IMAGES, skip=True)
    with pytest.raises(InterventionError, match="'Patches' was not run inside the block"):
        with plan().hooks(network):
            pass
    with pytest.raises(
        InterventionError,
        match=r"fire once in a pass of 'Patches', but fired {'hook_mix': 2} times",
    ):
        capture_tensors(network, {"images": IMAGES, "twice": True}, ["hook_mix"])
    with pytest.raises(HookNameError, match=r"closest: 'hook_mix'"):
        capture_tensors(network, IMAGES, ["hook_mixed"])
    with pytest.raises(DataError, match="inputs is empty"):
        capture_tensors(network, [], ["hook_mix"])
    with pytest.raises(ModelStateError, match=r"call model\.eval"):
        capture_tensors(network.train(), IMAGES, ["hook_mix"])


def in_turn(network: Any, *works: Any) -> list[Any]:
    """What each returns, run in threads whose passes are all between the first and the second hook
    point at once."""
    inside = threading.Barrier(len(works), timeout=60)

    def wait(*_: Any) -> None:
        inside.wait()

    handle = network.mix.register_forward_hook(wait)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            return [future.result() for future in [pool.submit(work) for work in works]]
    finally:
        handle.remove()


def test_threads_that_are_in_a_pass_at_once_are_each_at_their_own_place(network: Any) -> None:
    images = [IMAGES, IMAGES.flip(0), IMAGES[:2]]
    both = SteeringPlan(
        vectors=plan("hook_embed").vectors + plan("hook_mix").vectors, positions=[1, 3]
    )
    want = []
    for each in images:
        with both.hooks(network):
            want.append(network(each))
    handle = both.attach(network)
    found = in_turn(network, *(lambda each=each: network(each) for each in images))
    handle.remove()
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    assert handle.report.n_forwards == len(images)
    assert handle.report.n_edited == dict.fromkeys(("hook_embed", "hook_mix"), 2 * (5 + 5 + 2))


def test_a_pass_of_another_thread_is_not_counted(network: Any) -> None:
    host, reports = as_host(network), []
    plans = [plan("hook_embed"), plan("hook_mix")]
    want = [network(IMAGES)]
    for one in plans:
        with one.hooks(host):
            want.append(network(IMAGES))

    def steered(one: SteeringPlan) -> Tensor:
        with one.hooks(host) as report:
            reports.append(report)
            return network(IMAGES)

    works = [lambda: network(IMAGES), *(lambda one=one: steered(one) for one in plans)]
    found = in_turn(network, *works)
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    assert [report.n_forwards for report in reports] == [1, 1]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with (
            pytest.raises(InterventionError, match="by threads or tasks that were not started"),
            plan().hooks(network),
        ):
            assert torch.equal(pool.submit(network, IMAGES).result(), want[0])


def test_a_language_model_can_be_captured_through_tensors_too() -> None:
    """On ids, with the numbers of `capture`."""
    model = models.bridge("gpt2")
    ids = as_host(model).tokenize(["the cat saw a dog"]).input_ids
    name = "blocks.1.hook_resid_post"
    store = capture_tensors(model, ids, [name], positions="last")
    torch.testing.assert_close(
        store[name], capture(model, ["the cat saw a dog"], [name])[name], atol=2e-5, rtol=0
    )
    assert store.provenance["basis"] == "centred"


def test_the_example_in_the_module_runs() -> None:
    failed, tried = doctest.testmod(hooked_module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried >= 6
    assert failed == 0
