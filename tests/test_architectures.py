"""Every architecture that is claimed is steered exactly, or refused with the reason.

Here all of them on Hugging Face and some on every host, with TransformerLens 3 all of them on
HookedTransformer; `make architectures` tries all on all and writes the table of
`docs/model_kinds.md`."""

from __future__ import annotations

import pathlib
from importlib.util import find_spec

import architectures
import conformance
import pytest

TABLE = pathlib.Path(__file__).resolve().parents[1] / "benchmarks/results/architectures.md"
PAIRS = [
    (family, host)
    for family in architectures.CONFIGS
    for host in conformance.HOSTS
    if conformance.can_try(host)
    and (
        host in ("huggingface", "hooked_transformer")
        or family in conformance.USUAL
        or (family, host) in conformance.REFUSED
    )
]


@pytest.mark.parametrize(("family", "host"), PAIRS)
def test_an_architecture_is_steered_exactly_or_refused(family: str, host: str) -> None:
    if (family, host) == conformance.NEEDS_TORCHVISION and find_spec("torchvision"):
        pytest.skip("with torchvision it is not refused")
    conformance.check(family, host)


def test_the_table_names_every_architecture_and_no_other() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    found = [row.split("|")[1].strip() for row in rows[1:]]
    assert found == [f"`{family}`" for family in architectures.CONFIGS]
    for row in rows[1:]:
        family = row.split("`")[1]
        hosts = dict(zip(conformance.HOSTS, row.split("|")[3:], strict=False))
        refused = {host for host, cell in hosts.items() if "refused" in cell}
        assert refused == {host for one, host in conformance.REFUSED if one == family}
