"""Save, load and share plans and results: a folder with `config.json`, safetensors and a card.
Never pickle.

`config.json` has what all kinds share (format, kind, checksums, versions) and beside it what the
kind writes, see the table in `kinds.py`. Format 2 has a checksum over the whole of it, of which the
checksum of the tensor file is a part; format 1 (version 0.1.0) is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from expertsteer_lens._atomic import check_path, check_place, named, readable, write_folder
from expertsteer_lens._checked_json import digest_of, read_object
from expertsteer_lens._checks import shown
from expertsteer_lens.errors import ArgumentError, ArtifactError

from .card import plan_card
from .hub import download, upload
from .kinds import KINDS, Kind, SavedContent, kind_of
from .upgrade import upgrade

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
_NOT_OURS = (KeyError, TypeError, AttributeError, RecursionError)
"""What JSON of another shape than ours leads to."""


def save(thing: Any, path: str | Path) -> Path:
    """Write a plan or a result to a folder, replacing one of its kind that is there only once the
    new one is complete: whenever the process dies, `load` finds the one or the other.

    A second writer to the same folder waits for the first. Files of others in the folder stay.

    Args:
        thing: a `SteeringPlan`; or an `ExpertSteering` (all of a fit: states, maps, RFMs, scores,
            texts kept apart; no model), `ActivationStore`, `Aligner`, `RFM`, `LayerPairMI`,
            `LayerPairs`, `Calibration` or `Evaluation`; what `Interrupted.finished` holds; or a
            registered kind of yours.
        path: the folder.

    Raises:
        ArgumentError: something else, or it holds a function (positions, the score of a gate),
            which a file cannot.
        ArtifactError: the folder exists and holds something else, or it cannot be written (no
            room, no permission); what was there before is as it was.

    >>> import tempfile
    >>> from expertsteer_lens import ActivationStore
    >>> states = ActivationStore({"blocks.0.hook_resid_post": torch.eye(2)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(states, folder + "/states")
    ...     load(path)["blocks.0.hook_resid_post"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    check_place(path)
    path, kind = Path(path), kind_of(thing)
    write_folder(
        path,
        lambda folder: _write(thing, kind, folder),
        ours=("config.json", "README.md", kind.tensor_file),
        check=lambda there: check_replaceable(there, kind.name, path),
    )
    return path


def check_replaceable(folder: str | Path, kind: str, shown: str | Path | None = None) -> None:
    """Whether `save` may write a thing of this kind to a folder.

    Args:
        folder: which need not exist.
        kind: name of its class, e.g. "SteeringPlan".
        shown: what the message calls the folder; default: as it is.

    Raises:
        ArtifactError: something else is there.
    """
    there = Path(folder)
    occupied = there.exists() and (not there.is_dir() or any(there.iterdir()))
    if occupied and kind_of_saved(there) != kind:
        raise ArtifactError(
            f"{shown or folder} exists and is not a saved plan or result of this kind; choose "
            "another folder or remove it yourself."
        )


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    target: Any = None,
    allow_mismatch: bool = False,
) -> Any:
    """Read what `save` or `capture(..., store=)` wrote, from a folder, or from a hub id such as
    "user/repo" if there is no such folder.

    The hub is asked only for a text of the form `owner/name` where no folder `owner` exists (then a
    misspelt path is likelier), or for `hf://owner/name`.

    Imports no host. Whether a plan fits a model is checked when it is attached (fingerprint, width,
    hook names).

    Args:
        path: folder or hub id.
        revision: of the hub repository: branch, tag or commit.
        token: for the hub; default: the one this machine is logged in with.
        cache_dir: where what the hub sends is kept; default: that of huggingface_hub.
        local_files_only: take what was fetched before, ask nobody.
        target: the model that a saved fit steers; without it the fit can be looked at and makes
            plans of a given strength, but cannot calibrate.
        allow_mismatch: take a target other than the one the fit was made for.

    Raises:
        ArtifactError: a file is missing, damaged or changed, a field is unknown, the format is
            newer than this package, or `target` is another model.
        ArgumentError: `target` for something that is no fit.

    Example:
        >>> import tempfile
        >>> import expertsteer_lens as esl
        >>> vectors = {"blocks.1.hook_resid_post": torch.tensor([3.0, 4.0])}
        >>> plan = esl.SteeringPlan.from_vectors(vectors, coefficient=5.0, relative_to="unit")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = esl.save(plan, f"{folder}/mine")
        ...     esl.load(f"{folder}/mine").vectors
        (blocks.1.hook_resid_post: add +5, d=2,)
    """
    check_path(path)
    with named(path, "cannot be read"):
        for attempt in range(20):
            found = readable(Path(path))
            if found is None:
                break
            before = _identity(found)
            try:
                return _load_folder(found, target, allow_mismatch)
            except (ArtifactError, OSError):
                now = readable(Path(path))
                unchanged = before is not None and now is not None and before == _identity(now)
                if unchanged or attempt == 19:
                    raise  # else `save` replaced the folder while it was read
    files = ["config.json", "README.md", *_tensor_files()]
    folder = download(
        path,
        files,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return _load_folder(folder, target, allow_mismatch)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another that takes its name."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _load_folder(folder: Path, target: Any, allow_mismatch: bool) -> Any:
    # Imported here, so that `import expertsteer_lens` does not bring data and hosts.
    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.data.states_folder import is_states_folder

    if not (folder / "config.json").is_file() and is_states_folder(folder):
        if target is not None:
            raise ArgumentError(f"target= goes with a saved fit, but {folder} holds states.")
        return ActivationStore.open(folder)
    config, file = _read_config(folder), folder / "config.json"
    _check_version(config, folder)
    _check_content(config, file)
    try:
        config = upgrade(config)
    except _NOT_OURS as error:
        raise ArtifactError(f"{file} lacks what its format has: {error}.") from error
    kind = KINDS.get(str(config.get("kind")))
    if kind is None:
        raise ArtifactError(
            f"{folder} holds a {shown(config.get('kind'))}, which this package does not know; "
            f"known are {list(KINDS)}."
        )
    if target is not None and not kind.takes_target:
        raise ArgumentError(
            f"target= goes with a saved fit, but {folder} holds a saved {kind.name}; leave it out."
        )
    tensors = _read_tensors(folder / kind.tensor_file, config)
    shared = ("format_version", "kind", "versions", "content_sha256", _digest_key(kind.tensor_file))
    content = {name: value for name, value in config.items() if name not in shared}
    return kind.read(
        SavedContent(content, tensors, str(file)),
        lambda facts: _model_for(facts, target, allow_mismatch),
    )


def push_to_hub(
    thing: Any,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    evaluation: Any = None,
) -> str:
    """Upload a plan or a result to the Hugging Face hub and return the address of the commit;
    `load(repo_id)` reads it back.

    Nothing is asked of the hub before the files are written and known to be complete. Think of what
    is in them: a fit holds the texts it keeps for calibration and test, and states of all others.

    Args:
        thing: see `save`.
        repo_id: "owner/name", or "name" for the owner of the token.
        private: of a repository that does not exist yet.
        token: of the account; default: the one this machine is logged in with.
        commit_message: default: that of huggingface_hub.
        revision: branch, made if it does not exist; default: main.
        create_pr: open a pull request on a repository that exists, in place of a commit.
        evaluation: an `Evaluation` of the plan, whose verdict and table its card shows.

    Raises:
        ArgumentError: it cannot be saved, the name is none a repository can have, or `evaluation`
            for something that is no plan.
        ArtifactError: the hub refused.

    Example:
        >>> url = push_to_hub(plan, "me/happier", evaluation=result)  # doctest: +SKIP
        >>> plan = expertsteer_lens.load("me/happier")  # doctest: +SKIP
    """
    kind = kind_of(thing)
    if evaluation is not None and kind.name != "SteeringPlan":
        raise ArgumentError(f"evaluation= goes with a plan, but this is a {kind.name}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(thing, kind, folder)
        if evaluation is not None:
            (folder / "README.md").write_text(plan_card(thing, evaluation), encoding="utf-8")
        return upload(
            folder,
            repo_id,
            stale=_tensor_files(),
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _tensor_files() -> list[str]:
    return sorted({kind.tensor_file for kind in KINDS.values()})


def kind_of_saved(folder: Path) -> str | None:
    """The class of what `save` wrote there; None if it wrote nothing there."""
    try:
        found = readable(folder)
        return None if found is None else str(upgrade(_read_config(found)).get("kind"))
    except (ArtifactError, *_NOT_OURS):
        return None


# -- writing --------------------------------------------------------------------------------------


def _write(thing: Any, kind: Kind, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from expertsteer_lens import __version__

    saved, file = kind.write(thing), folder / kind.tensor_file
    header = {"format": "expertsteer_lens", "format_version": str(FORMAT_VERSION)}
    try:
        save_file(saved.tensors, file, header)
    except SafetensorError as error:  # its name for a full disk
        raise OSError(str(error)) from error
    config = {
        "format_version": FORMAT_VERSION,
        "kind": kind.name,
        **saved.fields,
        _digest_key(file.name): _digest_file(file),
        "versions": {"expertsteer_lens": __version__, "torch": torch.__version__},
    }
    config["content_sha256"] = digest_of(config)
    (folder / "README.md").write_text(kind.card(thing), encoding="utf-8")
    text = json.dumps(config, indent=2, allow_nan=False)
    (folder / "config.json").write_text(text, encoding="utf-8")
    # safetensors makes files that nobody else may read, whatever this process's umask says.
    shutil.copymode(folder / "config.json", file)


def _digest_key(tensor_file: str) -> str:
    """Where `config.json` keeps the checksum of the tensor file."""
    return f"{Path(tensor_file).stem}_sha256"


def _digest_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- reading --------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(p for p in folder.glob("*") if (p / "config.json").is_file())
        hint = f"; what was saved is in {' and '.join(map(str, inside[:3]))}" if inside else ""
        raise ArtifactError(
            f"{folder} is not a saved plan or result: config.json is missing{hint}."
        )
    config = read_object(path)
    if "format_version" not in config:
        raise ArtifactError(f"{path} has no format_version; it was not written by `save`.")
    return config


def _check_version(config: dict[str, Any], folder: Path) -> None:
    version = config["format_version"]
    if type(version) is not int or version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ArtifactError(
            f"{folder} has format_version {str(version)[:100]}, this package reads {readable}; "
            "install the version of expertsteer-lens that wrote it (see 'versions' in config.json)."
        )


def _check_content(config: dict[str, Any], file: Path) -> None:
    """Without the key nothing is checked: format 1 had none, and who edits a file by hand declares
    it by deleting the key."""
    if "content_sha256" in config and config["content_sha256"] != digest_of(config):
        raise ArtifactError(
            f"{file} is damaged or was edited: its content does not match its content_sha256. If "
            'the edit is yours, delete the "content_sha256" entry from the file to say so; if not, '
            "take the file from where it was saved again."
        )


def _read_tensors(file: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    if not file.is_file():
        raise ArtifactError(f"{file.parent} is incomplete: {file.name} is missing.")
    try:
        data = file.read_bytes()  # once: what is checked is what is parsed
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error}).") from error
    if hashlib.sha256(data).hexdigest() != config.get(_digest_key(file.name)):
        raise ArtifactError(f"{file} is damaged: its checksum differs from the one in config.json.")
    try:
        tensors: dict[str, torch.Tensor] = parse(data)
    except SafetensorError as error:
        raise ArtifactError(f"{file} is no safetensors file: {error}.") from error
    return tensors


def _model_for(facts: dict[str, Any], target: Any, allow_mismatch: bool) -> Any:
    """What stands for the model of a saved fit: the target given, or its facts alone."""
    from expertsteer_lens.pipeline.fitted import AbsentModel

    if target is None:
        return AbsentModel(facts)
    from expertsteer_lens.hosts import as_host, fingerprints_match

    host = as_host(target)
    if not allow_mismatch and not fingerprints_match(
        str(facts.get("fingerprint")), host.fingerprint
    ):
        raise ArtifactError(
            f"this fit was made for fingerprint {facts.get('fingerprint')} "
            f"({facts.get('name', '?')}), the target given "
            f"({host.name}) has {host.fingerprint}; pass allow_mismatch=True to use it anyway."
        )
    return host
