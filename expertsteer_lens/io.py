"""Save, load and share plans: a folder with `config.json`, `vectors.safetensors` and a model card. Never pickle."""

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

from .errors import ArgumentError, ArtifactError

if TYPE_CHECKING:
    from .plan import SteeringPlan

FORMAT_VERSION = 1
FILES = ("config.json", "vectors.safetensors")
SIGN_CONVENTION = "directions are unit vectors pointing towards the positive class; coefficient > 0 steers towards it"


def save(plan: SteeringPlan, path: str | Path) -> Path:
    """Write a plan to a folder, replacing a plan that is already there only once the new one is complete.

    Raises:
        ArgumentError: the plan's positions are a function, which a file cannot hold.
        ArtifactError: the folder exists and holds something other than a plan.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").exists())):
        raise ArtifactError(f"{path} exists and is not a saved plan; choose another folder or remove it yourself.")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(plan, work)
        path.mkdir(exist_ok=True)
        for file in work.iterdir():  # each replaced atomically; config.json last, since it vouches for the others
            if file.name != "config.json":
                file.replace(path / file.name)
        (work / "config.json").replace(path / "config.json")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def load(path: str | Path, *, revision: str | None = None) -> SteeringPlan:
    """Read a plan from a folder, or from a hub id such as "user/repo" if no such folder exists. Imports no host.

    Whether it fits a model is checked when it is attached (fingerprint, width, hook names).

    Raises:
        ArtifactError: a file is missing or damaged, a field is unknown, or the format is newer than this package.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _download(str(path), revision)
    for name in FILES:
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is not a saved plan: {name} is missing.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder / 'config.json'} is damaged: {error}.") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise ArtifactError(f"{folder / 'config.json'} has no format_version; it is not a saved plan.")
    if config["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format_version {config['format_version']}, this package reads {FORMAT_VERSION}; "
            "install the version of expertsteer-lens that wrote it (see 'versions' in config.json)."
        )
    data = (folder / "vectors.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != config.get("vectors_sha256"):
        raise ArtifactError(
            f"{folder / 'vectors.safetensors'} is damaged: its checksum differs from the one in config.json."
        )
    from safetensors.torch import load as load_tensors

    return _plan_from(config, load_tensors(data), folder)


def push_to_hub(plan: SteeringPlan, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a plan to the Hugging Face hub and return its address; `load(repo_id)` reads it back."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _write(plan, Path(folder))
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def _write(plan: SteeringPlan, folder: Path) -> None:
    from safetensors.torch import save as save_tensors

    from . import __version__

    tensors = {str(i): v.direction.detach().float().cpu().contiguous().clone() for i, v in enumerate(plan.vectors)}
    blob = save_tensors(tensors, {"format": "expertsteer_lens", "format_version": str(FORMAT_VERSION)})
    config = {
        "format_version": FORMAT_VERSION,
        "sign_convention": SIGN_CONVENTION,
        "vectors": [_vector_fields(v) for v in plan.vectors],
        "positions": _encode_positions(plan.positions),
        "basis": plan.basis,
        "target": dict(plan.target),
        "provenance": dict(plan.provenance),
        "vectors_sha256": hashlib.sha256(blob).hexdigest(),
        "versions": {"expertsteer_lens": __version__, "torch": torch.__version__},
    }
    (folder / "vectors.safetensors").write_bytes(blob)
    (folder / "README.md").write_text(_card(plan), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_plain(config), indent=2, allow_nan=False), encoding="utf-8")


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
    return SteeringPlan(
        vectors=tuple(vectors),
        positions=_decode_positions(config["positions"]),
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


def _encode_positions(positions: Any) -> Any:
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    if callable(positions):
        raise ArgumentError(
            "positions is a function, which cannot be saved; use plan.with_positions('all') before saving."
        )
    return list(positions) if isinstance(positions, tuple | list) else positions


def _decode_positions(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) != {"slice"} or not isinstance(value["slice"], list) or len(value["slice"]) != 3:
            raise ArtifactError(f"positions {value!r} is not understood.")
        return slice(*value["slice"])
    return value


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
