"""Save, load and share plans and results: a folder with `config.json`, safetensors and a card. Never pickle.

A plan is written field by field in a format of its own, for others to read; everything else as `_codec` says.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._codec import KINDS, class_of, decode, encode
from .errors import ArgumentError, ArtifactError
from .positions import positions_from_json, positions_to_json

if TYPE_CHECKING:
    from .plan import SteeringPlan

FORMAT_VERSION = 1
PLAN, VECTORS, TENSORS = "SteeringPlan", "vectors.safetensors", "tensors.safetensors"
FILES = ("config.json", VECTORS, TENSORS)
SIGN_CONVENTION = "directions are unit vectors pointing towards the positive class; coefficient > 0 steers towards it"


def save(thing: Any, path: str | Path) -> Path:
    """Write a plan or a result to a folder, replacing one of its kind that is there only once the new one is complete.

    Args:
        thing: a `SteeringPlan`; or an `ExpertSteering` (all of a fit: states, maps, RFMs, scores, texts kept apart; no model),
            `ActivationStore`, `Aligner`, `RFM`, `LayerPairMI`, `LayerPairs`, `Calibration` or `Evaluation`.
        path: the folder.

    Raises:
        ArgumentError: something else, or it holds a function (positions, the score of a gate), which a file cannot.
        ArtifactError: the folder exists and holds something else.
    """
    path, kind = Path(path), _kind_of(thing)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and kind_of_saved(path) != kind:
        raise ArtifactError(
            f"{path} exists and is not a saved plan or result of this kind; choose another folder or remove it yourself."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(thing, work)
        path.mkdir(exist_ok=True)
        for file in work.iterdir():  # each replaced atomically; config.json last, since it vouches for the others
            if file.name != "config.json":
                file.replace(path / file.name)
        (work / "config.json").replace(path / "config.json")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def load(path: str | Path, *, revision: str | None = None, target: Any = None, allow_mismatch: bool = False) -> Any:
    """Read what `save` wrote, from a folder, or from a hub id such as "user/repo" if no such folder exists.

    Imports no host. Whether a plan fits a model is checked when it is attached (fingerprint, width, hook names).

    Args:
        path: folder or hub id.
        revision: of the hub repository.
        target: the model that a saved fit steers; without it the fit can be looked at and makes plans of a given strength, but
            cannot calibrate.
        allow_mismatch: take a target other than the one the fit was made for.

    Raises:
        ArtifactError: a file is missing or damaged, a field is unknown, the format is newer than this package, or `target` is
            another model.
        ArgumentError: `target` for something that is no fit.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _download(str(path), revision)
    config = _config_in(folder)
    if config["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format_version {config['format_version']}, this package reads {FORMAT_VERSION}; "
            "install the version of expertsteer-lens that wrote it (see 'versions' in config.json)."
        )
    kind = config.get("kind", PLAN)
    if kind != PLAN and kind not in KINDS:
        raise ArtifactError(f"{folder} holds a {kind!r}, which this package does not know; known are {[PLAN, *KINDS]}.")
    if target is not None and kind != "ExpertSteering":
        raise ArgumentError(f"target= goes with a saved fit, but {folder} holds a {kind}; leave it out.")
    tensors = _tensors_in(folder / (VECTORS if kind == PLAN else TENSORS), config)
    return _plan_from(config, tensors, folder) if kind == PLAN else _result_from(
        config, tensors, folder, lambda facts: _model_for(facts, target, allow_mismatch)
    )  # fmt: skip


def push_to_hub(thing: Any, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a plan or a result to the Hugging Face hub and return its address; `load(repo_id)` reads it back.

    Think of what is in it: a fit holds the texts it keeps for calibration and test, and states of all others.
    """
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
    from .plan import SteeringPlan

    if isinstance(thing, SteeringPlan):
        return PLAN
    name = type(thing).__name__
    if name not in KINDS or not isinstance(thing, class_of(name)):
        raise ArgumentError(f"a {name} cannot be saved; save takes {', '.join([PLAN, *KINDS])}.")
    return name


# -- what all kinds share ---------------------------------------------------------------------------------------------------


def _write(thing: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    from . import __version__

    kind = _kind_of(thing)
    content, tensors = _plan_content(thing) if kind == PLAN else _result_content(thing)
    file = folder / (VECTORS if kind == PLAN else TENSORS)
    save_file(tensors, file, {"format": "expertsteer_lens", "format_version": str(FORMAT_VERSION)})
    config = {
        "format_version": FORMAT_VERSION,
        **content,
        f"{file.stem}_sha256": _digest(file),
        "versions": {"expertsteer_lens": __version__, "torch": torch.__version__},
    }
    (folder / "README.md").write_text(_card(thing) if kind == PLAN else _result_card(thing), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False), encoding="utf-8")


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


# -- results ----------------------------------------------------------------------------------------------------------------


def _result_content(thing: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    content = encode(thing, tensors)
    return {"kind": type(thing).__name__, "content": content}, tensors


def _result_from(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path, model: Any) -> Any:
    _only(config, {"format_version", "kind", "content", "tensors_sha256", "versions"}, f"{folder / 'config.json'}")
    try:
        found = decode(config["content"], tensors, model)
    except (KeyError, ArtifactError) as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error}") from error
    if type(found).__name__ != config["kind"]:
        raise ArtifactError(f"{folder / 'config.json'} says it holds a {config['kind']}, but it does not.")
    return found


def _model_for(facts: dict[str, Any], target: Any, allow_mismatch: bool) -> Any:
    from .fitted import AbsentModel

    if target is None:
        return AbsentModel(facts)
    from .hosts import as_host, fingerprints_match

    host = as_host(target)
    if not allow_mismatch and not fingerprints_match(str(facts.get("fingerprint")), host.fingerprint):
        raise ArtifactError(
            f"this fit was made for fingerprint {facts.get('fingerprint')} ({facts.get('name', '?')}), the target given "
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


# -- plans ------------------------------------------------------------------------------------------------------------------


def _plan_content(plan: SteeringPlan) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors = {str(i): v.direction.detach().float().cpu().contiguous().clone() for i, v in enumerate(plan.vectors)}
    content = {
        "sign_convention": SIGN_CONVENTION,
        "vectors": [_vector_fields(v) for v in plan.vectors],
        "positions": positions_to_json(plan.positions),
        "basis": plan.basis,
        "target": dict(plan.target),
        "provenance": dict(plan.provenance),
    }
    return _plain(content), tensors


def _vector_fields(vector: Any) -> dict[str, Any]:
    entry = {f.name: getattr(vector, f.name) for f in fields(vector) if f.name not in ("direction", "gate")}
    return {**entry, "gate": None if vector.gate is None else vector.gate.to_dict()}


def _plan_from(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> SteeringPlan:
    from .plan import SteeringPlan, SteeringVector

    known = {
        "format_version", "sign_convention", "vectors", "positions", "basis", "target", "provenance", "vectors_sha256",
        "versions",
    }  # fmt: skip
    _only(config, known, f"{folder / 'config.json'}")
    missing = sorted(known - set(config))
    if missing:
        raise ArtifactError(f"{folder / 'config.json'} lacks the field {missing[0]!r}.")
    names = {f.name for f in fields(SteeringVector)} - {"direction"}
    vectors = []
    for i, entry in enumerate(config["vectors"]):
        _only(entry, names, f"{folder / 'config.json'}, vectors[{i}]")
        if str(i) not in tensors:
            raise ArtifactError(
                f"{folder / 'vectors.safetensors'} has no tensor for vectors[{i}] ({entry.get('hook_name')})."
            )
        try:
            vectors.append(SteeringVector(direction=tensors[str(i)], **entry))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{folder / 'config.json'}, vectors[{i}] is invalid: {error}") from error
    try:
        positions = positions_from_json(config["positions"])
    except ArgumentError as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error}") from error
    return SteeringPlan(
        vectors=tuple(vectors),
        positions=positions,
        basis=config["basis"],
        target=config["target"],
        provenance=config["provenance"],
    )


def _only(entry: Any, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where} must be a JSON object, got {type(entry).__name__}.")
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ArtifactError(f"{where} has an unknown field {unknown[0]!r}; known fields are {sorted(known)}.")


def _plain(value: Any) -> Any:
    """JSON-able copy; NaN and Inf become null, since JSON has neither."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ArtifactError(f"{repo_id} is neither a folder nor a hub id such as 'user/repo'.")
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*FILES, "README.md"]))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the caller
        raise ArtifactError(f"no folder {repo_id!r}, and it could not be fetched from the hub: {error}") from error


def _card(plan: SteeringPlan) -> str:
    target, expert = plan.target or {}, plan.provenance.get("expert") or {}
    rows = "\n".join(
        f"| `{v.hook_name}` | {v.edit} | {v.coefficient:g} | {v.relative_to} | "
        f"{'' if v.median_norm is None else f'{v.median_norm:.4g}'} |"
        for v in plan.vectors
    )
    return f"""---
library_name: expertsteer-lens
tags: [activation-steering, expertsteer]
---

# Steering plan for {target.get("name", "an unnamed model")}

Directions taught by {expert.get("name", "the caller")}. {SIGN_CONVENTION[0].upper() + SIGN_CONVENTION[1:]}.

| hook point | edit | coefficient | unit | median norm |
|---|---|---|---|---|
{rows}

Positions: `{plan.positions}`. Residual basis: `{plan.basis}`. Target fingerprint: `{target.get("fingerprint")}`.

```python
import expertsteer_lens as esl

plan = esl.load("this folder or hub id")
with plan.hooks(model):
    ...
```

All settings, seeds, hashes of the data and the calibration curve are in `config.json`.
"""
