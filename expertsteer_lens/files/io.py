"""Save, load and share plans and results: a folder with `config.json`, safetensors and a card.
Never pickle.

A plan is written field by field (`_plan_format`), for others to read; everything else as `_codec`
says."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from expertsteer_lens.errors import ArgumentError, ArtifactError

from .codec import KINDS, class_of, decode, encode
from .plan_file import check_fields, plan_card, plan_content, plan_from

FORMAT_VERSION = 1
PLAN, VECTORS, TENSORS = "SteeringPlan", "vectors.safetensors", "tensors.safetensors"
FILES = ("config.json", VECTORS, TENSORS)


def save(thing: Any, path: str | Path) -> Path:
    """Write a plan or a result to a folder, replacing one of its kind that is there only once the
    new one is complete.

    Args:
        thing: a `SteeringPlan`; or an `ExpertSteering` (all of a fit: states, maps, RFMs, scores,
            texts kept apart; no model), `ActivationStore`, `Aligner`, `RFM`, `LayerPairMI`,
            `LayerPairs`, `Calibration` or `Evaluation`.
        path: the folder.

    Raises:
        ArgumentError: something else, or it holds a function (positions, the score of a gate),
            which a file cannot.
        ArtifactError: the folder exists and holds something else.
    """
    path, kind = Path(path), _kind_of(thing)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and kind_of_saved(path) != kind:
        raise ArtifactError(
            f"{path} exists and is not a saved plan or result of this kind; choose another folder "
            "or remove it yourself."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(thing, work)
        path.mkdir(exist_ok=True)
        for file in (
            work.iterdir()
        ):  # each replaced atomically; config.json last, since it vouches for the others
            if file.name != "config.json":
                file.replace(path / file.name)
        (work / "config.json").replace(path / "config.json")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    target: Any = None,
    allow_mismatch: bool = False,
) -> Any:
    """Read what `save` wrote, from a folder, or from a hub id such as "user/repo" if no such folder
    exists.

    Imports no host. Whether a plan fits a model is checked when it is attached (fingerprint, width,
    hook names).

    Args:
        path: folder or hub id.
        revision: of the hub repository.
        target: the model that a saved fit steers; without it the fit can be looked at and makes
            plans of a given strength, but cannot calibrate.
        allow_mismatch: take a target other than the one the fit was made for.

    Raises:
        ArtifactError: a file is missing or damaged, a field is unknown, the format is newer than
            this package, or `target` is another model.
        ArgumentError: `target` for something that is no fit.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _download(str(path), revision)
    config = _config_in(folder)
    if config["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format_version {config['format_version']}, this package reads "
            f"{FORMAT_VERSION}; "
            "install the version of expertsteer-lens that wrote it (see 'versions' in config.json)."
        )
    kind = str(config.get("kind", PLAN))
    if kind != PLAN and kind not in KINDS:
        raise ArtifactError(
            f"{folder} holds a {kind!r}, which this package does not know; known are "
            f"{[PLAN, *KINDS]}."
        )
    if target is not None and kind != "ExpertSteering":
        raise ArgumentError(
            f"target= goes with a saved fit, but {folder} holds a {kind}; leave it out."
        )
    tensors = _tensors_in(folder / (VECTORS if kind == PLAN else TENSORS), config)
    return (
        plan_from(config, tensors, folder)
        if kind == PLAN
        else _result_from(
            config, tensors, folder, lambda facts: _model_for(facts, target, allow_mismatch)
        )
    )


def push_to_hub(
    thing: Any, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload a plan or a result to the Hugging Face hub and return its address; `load(repo_id)`
    reads it back.

    Think of what is in it: a fit holds the texts it keeps for calibration and test, and states of
    all others."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _write(thing, Path(folder))
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def kind_of_saved(folder: Path) -> str | None:
    """The class of what `save` wrote there; None if it wrote nothing there."""
    try:
        config = _config_in(folder)
    except ArtifactError:
        return None
    return str(config.get("kind", PLAN))


def _kind_of(thing: Any) -> str:
    from expertsteer_lens.steer.plan import SteeringPlan

    if isinstance(thing, SteeringPlan):
        return PLAN
    name = type(thing).__name__
    if name not in KINDS or not isinstance(thing, class_of(name)):
        raise ArgumentError(f"a {name} cannot be saved; save takes {', '.join([PLAN, *KINDS])}.")
    return name


# -- what all kinds share -------------------------------------------------------------------------


def _write(thing: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    from expertsteer_lens import __version__

    kind = _kind_of(thing)
    content, tensors = plan_content(thing) if kind == PLAN else _result_content(thing)
    file = folder / (VECTORS if kind == PLAN else TENSORS)
    save_file(tensors, file, {"format": "expertsteer_lens", "format_version": str(FORMAT_VERSION)})
    config = {
        "format_version": FORMAT_VERSION,
        **content,
        f"{file.stem}_sha256": _digest(file),
        "versions": {"expertsteer_lens": __version__, "torch": torch.__version__},
    }
    (folder / "README.md").write_text(
        plan_card(thing) if kind == PLAN else _result_card(thing), encoding="utf-8"
    )
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, allow_nan=False), encoding="utf-8"
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _config_in(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a saved plan or result: config.json is missing.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise ArtifactError(f"{path} has no format_version; it was not written by `save`.")
    return config


def _tensors_in(file: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if not file.is_file():
        raise ArtifactError(f"{file.parent} is incomplete: {file.name} is missing.")
    if _digest(file) != config.get(f"{file.stem}_sha256"):
        raise ArtifactError(f"{file} is damaged: its checksum differs from the one in config.json.")
    return load_file(file)


# -- results --------------------------------------------------------------------------------------


def _result_content(thing: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    content = encode(thing, tensors)
    return {"kind": type(thing).__name__, "content": content}, tensors


def _result_from(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path, model: Any
) -> Any:
    check_fields(
        config,
        {"format_version", "kind", "content", "tensors_sha256", "versions"},
        f"{folder / 'config.json'}",
    )
    try:
        found = decode(config["content"], tensors, model)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error}") from error
    if type(found).__name__ != config["kind"]:
        raise ArtifactError(
            f"{folder / 'config.json'} says it holds a {config['kind']}, but it does not."
        )
    return found


def _model_for(facts: dict[str, Any], target: Any, allow_mismatch: bool) -> Any:
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


def _result_card(thing: Any) -> str:
    return f"""---
library_name: expertsteer-lens
tags: [activation-steering, expertsteer]
---

# {type(thing).__name__}

```
{thing!r}
```

```python
import expertsteer_lens as esl

found = esl.load("this folder or hub id")
```
"""


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ArtifactError(f"{repo_id} is neither a folder nor a hub id such as 'user/repo'.")
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[*FILES, "README.md"])
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same to the caller
        raise ArtifactError(
            f"no folder {repo_id!r}, and it could not be fetched from the hub: {error}"
        ) from error
