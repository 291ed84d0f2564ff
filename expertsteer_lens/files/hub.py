"""The Hugging Face hub: which names mean it, up and down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from expertsteer_lens._checks import shown
from expertsteer_lens.errors import ArgumentError, ArtifactError

from .card import located

PREFIX = "hf://"
"""Says that a name is one of the hub, whatever lies in the working folder."""
LONGEST = 200
"""Characters of a hub id; the hub itself allows fewer."""
_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"


def hub_id(name: str | Path) -> str | None:
    """The hub id that `name` means, None if it means a path.

    A hub id is a text `owner/name` (or `hf://owner/name`). A `Path`, and a text with another number
    of parts or with `.`, `~` or `/` before it, is a path; so is `owner/name` where there is a
    folder `owner`, since a misspelt file must not become a request to strangers.
    """
    if not isinstance(name, str):
        return None
    bare = name.removeprefix(PREFIX)
    if len(bare) > LONGEST or re.fullmatch(f"{_NAME}/{_NAME}", bare) is None:
        return None
    if name.startswith(PREFIX):
        return bare
    return None if Path(name).parent.exists() else bare


def download(
    name: str | Path,
    files: list[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch the files of a repository of the hub, where they exist.

    Raises:
        ArtifactError: the name means a path, or it cannot be fetched.
    """
    repo_id = hub_id(name)
    if repo_id is None:
        said = shown(str(name))
        hint = f"; for the hub write {PREFIX}{name}" if _could_be_an_id(str(name)) else ""
        raise ArtifactError(
            f"there is no folder {said}, and it is neither a folder nor a hub id such as "
            f"'user/repo', so nothing was asked of the hub{hint}."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=files,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same to the caller
        raise ArtifactError(
            f"no folder {repo_id!r}, and it could not be fetched from the hub: {error}"
        ) from error
    return Path(folder)


def _could_be_an_id(name: str) -> bool:
    return name.count("/") == 1 and len(name) <= LONGEST


def upload(
    folder: Path,
    repo_id: str,
    *,
    stale: list[str],
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder that is complete, and return the address of the commit or pull request.

    Args:
        folder: what `save` writes.
        repo_id: "owner/name", or "name" for the owner of the token.
        stale: files of an earlier kind of thing, removed if they are there.
        private: of a repository that does not exist yet.
        token: of the account; default: the one this machine is logged in with.
        commit_message: default: that of huggingface_hub.
        revision: branch, made if it does not exist; default: main.
        create_pr: propose the change, on a repository that exists, in place of making it.

    Raises:
        ArgumentError: a name no repository can have.
        ArtifactError: the hub refused.
    """
    from huggingface_hub import HfApi

    name = repo_id.removeprefix(PREFIX)
    if re.fullmatch(f"(?:{_NAME}/)?{_NAME}", name) is None or "--" in name or ".." in name:
        raise ArgumentError(
            f"repo_id must be 'owner/name' or 'name', of letters, digits, '-', '_' and '.'; got "
            f"{shown(repo_id)}."
        )
    api: Any = HfApi(token=token)
    try:
        if create_pr and "/" in name:  # whoever proposes need not be the owner
            full = name
        else:
            full = str(api.create_repo(name, private=private, exist_ok=True).repo_id)
        if revision is not None and not create_pr:
            api.create_branch(full, branch=revision, exist_ok=True)
        card = folder / "README.md"
        card.write_text(located(card.read_text(encoding="utf-8"), full), encoding="utf-8")
        done = api.upload_folder(
            repo_id=full,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=[file for file in stale if not (folder / file).exists()],
        )
    except Exception as error:  # see `download`
        raise ArtifactError(f"{repo_id!r} could not be pushed to the hub: {error}") from error
    return str(done.pr_url if create_pr else done)
