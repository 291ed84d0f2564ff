"""A store of states in a folder: an index, and one safetensors file a hook point, which is mapped
into memory when it is asked for.

    index.json               what the rows are, in which batches they are read, and when all are
                             there the size and checksum of every file
    progress.jsonl           while it is written: a line for every batch that is there
    states-000.safetensors   of the first hook point: "states" `[n, d]`, one row a prompt (or token)
                             in the order of the prompts; "norms", where the rows are means: the
                             norm of every token they are means of

Every file of states is as large as it will be from the first batch on, and a batch is written to
its rows. The files are read by any reader of safetensors.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens._checked_json import DIGEST, digest_of, read_object
from expertsteer_lens.errors import ArtifactError

from .capture_plan import labels_from
from .states import CheckedStates

FORMAT = "expertsteer_lens states"
FORMAT_VERSION = 1
INDEX, PROGRESS = "index.json", "progress.jsonl"
_BYTES = 4  # states are float32


@dataclass(frozen=True, kw_only=True)
class StatesFile:
    """The file of one hook point."""

    hook_name: str
    number: int
    """Place among the hook points."""
    n: int
    width: int
    n_norms: int
    """How many token norms it has beside the states."""

    @property
    def name(self) -> str:
        """Within the folder; a name is never read from an index, so no index leads elsewhere."""
        return f"states-{self.number:03d}.safetensors"

    @property
    def header(self) -> bytes:
        """What the file begins with: a safetensors header, the same for the same sizes."""
        states = self.n * self.width * _BYTES
        entries: dict[str, Any] = {
            "__metadata__": {"format": FORMAT, "hook_name": self.hook_name},
            "states": {"dtype": "F32", "shape": [self.n, self.width], "data_offsets": [0, states]},
        }
        if self.n_norms:
            end = states + self.n_norms * _BYTES
            norms = {"dtype": "F32", "shape": [self.n_norms], "data_offsets": [states, end]}
            entries["norms"] = norms
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 64)  # the states begin where vectors of the processor may
        return len(text).to_bytes(8, "little") + text

    @property
    def n_bytes(self) -> int:
        """Of the whole file."""
        return self.norms_at(self.n_norms)

    def row_at(self, row: int) -> int:
        """Where a row of states begins."""
        return len(self.header) + row * self.width * _BYTES

    def norms_at(self, token: int) -> int:
        """Where the norm of a token stands."""
        return self.row_at(self.n) + token * _BYTES


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder.

    Raises:
        ArtifactError: it is missing, damaged, or of a later version.
    """
    file = folder / INDEX
    try:
        if not file.is_file():
            raise ArtifactError(f"{folder} is no store of states: {INDEX} is missing.")
        index = read_object(file)
        if index.get("format") != FORMAT:
            raise ArtifactError(f"{file} is no index of states.")
        if index.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{file} has format_version {index.get('format_version')!r}, this package reads "
                f"{FORMAT_VERSION}; install the version of expertsteer-lens that wrote it."
            )
        if index.get(DIGEST) != digest_of(index):
            raise ArtifactError(
                f"{file} is damaged or was edited: its content does not match its {DIGEST}; "
                "capture again into another folder."
            )
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error}).") from error
    return index


def is_states_folder(folder: Path) -> bool:
    """Whether there is an index of states, complete or not."""
    try:
        return read_object(folder / INDEX).get("format") == FORMAT
    except (ArtifactError, OSError):
        return False


def open_folder(
    folder: Path, *, check: bool = True
) -> tuple[CheckedStates, Tensor | None, dict[str, Any]]:
    """States, labels and provenance of a complete store; see `ActivationStore.open`.

    Raises:
        ArtifactError: it is not complete, or not what the index says.
    """
    folder = folder.absolute()  # files are mapped later, from wherever the process is then
    index = read_index(folder)
    if not index.get("complete"):
        there = len(read_progress(folder))
        raise ArtifactError(
            f"{folder} is not complete: {there} of {len(index.get('batches', ()))} batches are "
            "there; run the capture again with the same arguments and store=, and it goes on."
        )
    try:
        files = files_of(index)
        digests = {name: str(index["sha256"][name]) for name in files}
        labels = labels_from(index["labels"])
        provenance = dict(index["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{folder / INDEX} lacks what its format has: {error!r}.") from error
    return _states(folder, files, digests if check else {}), labels, provenance


def files_of(index: Mapping[str, Any]) -> dict[str, StatesFile]:
    """The files of an index whose widths are known, by hook name."""
    out = {}
    for number, name in enumerate(index["key"]["hook_names"]):
        sizes = (index["n_rows"], index["widths"][name], index["n_norms"])
        if not all(type(size) is int for size in sizes) or min(*sizes[:2], sizes[2] + 1) < 1:
            raise ValueError(f"sizes {sizes}")
        out[name] = StatesFile(
            hook_name=name, number=number, n=sizes[0], width=sizes[1], n_norms=sizes[2]
        )
    if not out:
        raise ValueError("no hook point")
    return out


def read_progress(folder: Path) -> dict[int, str]:
    """Number and checksum of the batches that were written. A line that a kill cut off, or that is
    none of ours, does not count."""
    out: dict[int, str] = {}
    file = folder / PROGRESS
    try:
        # A pipe or a device would be read for ever.
        lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    except OSError:
        return out
    for line in lines:
        try:
            entry = json.loads(line)
            number, digest = entry["batch"], entry["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(number) is int and isinstance(digest, str):
            out[number] = digest
    return out


def check_file(folder: Path, file: StatesFile) -> None:
    """Whether a file has the size and the header that the index asks for.

    Raises:
        ArtifactError: it has not, or cannot be read.
    """
    path = folder / file.name
    try:
        if not path.is_file():
            raise ArtifactError(f"{folder} is incomplete: {file.name} is missing.")
        size, header = path.stat().st_size, file.header
        with path.open("rb") as stream:
            same = stream.read(len(header)) == header
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error}).") from error
    if size != file.n_bytes or not same:
        raise ArtifactError(
            f"{path} is damaged: it is not the float32 matrix of {file.n} rows and {file.width} "
            f"columns of {file.hook_name!r} that {INDEX} says."
        )


def map_file(folder: Path, file: StatesFile) -> memoryview:
    """The bytes of a file, mapped; what is written to them stays in memory."""
    check_file(folder, file)
    try:
        with (folder / file.name).open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / file.name} cannot be read ({error}).") from error


def _states(
    folder: Path, files: Mapping[str, StatesFile], digests: Mapping[str, str]
) -> CheckedStates:
    for file in files.values():
        check_file(folder, file)
    mapped: dict[str, Tensor] = {}

    def read(hook_name: str) -> Tensor:
        if hook_name not in mapped:
            file = files[hook_name]
            content = map_file(folder, file)
            if digests and hashlib.sha256(content).hexdigest() != digests[hook_name]:
                raise ArtifactError(
                    f"{folder / file.name} is damaged: its checksum differs from the one in "
                    f"{INDEX}; capture again into another folder."
                )
            mapped[hook_name] = matrix_in(content, file)
        return mapped[hook_name]

    shapes = {name: (file.n, file.width) for name, file in files.items()}
    return CheckedStates(shapes, read, held=False)


def matrix_in(content: memoryview, file: StatesFile) -> Tensor:
    """The states in the bytes of a file."""
    count = file.n * file.width
    flat = torch.frombuffer(content, dtype=torch.float32, count=count, offset=file.row_at(0))
    return flat.view(file.n, file.width)
