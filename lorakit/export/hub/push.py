"""Pushes an adapter or a model to the Hub: ``lorakit.push_to_hub``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import HubError, LorakitError, listed
from lorakit.export.hub.check import HubTarget, check_repository, check_target, local_base_note
from lorakit.export.hub.client import hub_api, requests
from lorakit.export.hub.files import Upload, collect
from lorakit.notes import Say, to_stderr

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_KEPT = ".gitattributes"


@dataclass(frozen=True)
class PushReport:
    """``url`` is the repository's page, ``commit`` the id of the commit with ``files``."""

    url: str
    commit: str
    files: tuple[str, ...]
    size_bytes: int
    notes: tuple[str, ...] = ()


def push_to_hub(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
    say: Say = to_stderr,
) -> PushReport:
    """Upload the adapter or model in ``directory`` to the model repository ``repo`` as one commit.

    The repository is created if it does not exist, ``private`` or as the account's default is.
    ``revision`` is a branch, created if needed. ``base`` is the base model on the Hub, which the
    uploaded copy names if it was trained on a local directory. With ``overwrite``, a repository
    with another base or other files is replaced; its history remains. ``say`` receives notes.

    Raises UserError before the upload for what the user can correct, and HubError if it fails. The
    directory is never changed.
    """
    target = HubTarget(repo, private, revision, overwrite)
    check_target(target)
    upload = collect(directory, repo, base)
    api = hub_api(repo)
    check_repository(api, target, upload.base)
    notes = _notes(upload)
    for note in notes:
        say(note)
    with requests(repo):
        url, commit = _uploaded(api, target, upload)
    return PushReport(url, commit, tuple(upload.files), upload.size_bytes, notes)


def push_trained(
    directory: str | Path, target: HubTarget, say: Say, base: str | None = None
) -> PushReport:
    """``push_to_hub`` at the end of a run or merge. Raises HubError, which says that ``directory``
    is complete and how to push it again."""
    try:
        return push_to_hub(
            directory, target.repo, private=target.private, revision=target.revision, base=base,
            overwrite=target.overwrite, say=say,
        )  # fmt: skip
    except LorakitError as error:
        advice = f"{error.hint}, then " if error.hint else ""
        raise HubError(
            f"{error.problem}; {directory} is complete, only the upload failed (exit code 1)",
            about=error.about,
            allowed=error.allowed,
            hint=f"{advice}{_push_command(directory, target, base)}",
        ) from error


def _push_command(directory: str | Path, target: HubTarget, base: str | None) -> str:
    words = ["lorakit", "export", str(directory), "--to", "hub", "--repo", target.repo]
    words += ["--private"] if target.private else []
    words += ["--revision", target.revision] if target.revision else []
    words += ["--base", base] if base else []
    words += ["--overwrite"] if target.overwrite else []
    return shlex.join(words)


def _notes(upload: Upload) -> tuple[str, ...]:
    notes = []
    if upload.is_adapter and (note := local_base_note(upload.base)) is not None:
        notes.append(note)
    if upload.left_out:
        notes.append(f"not uploaded: {listed(upload.left_out)}")
    return tuple(notes)


def _uploaded(api: HfApi, target: HubTarget, upload: Upload) -> tuple[str, str]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, revision = target.repo, target.revision
    url = str(api.create_repo(repo, private=target.private or None, exist_ok=True))
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
        url = f"{url}/tree/{revision}"
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    if target.overwrite:
        stored = set(api.list_repo_files(repo, revision=revision))
        operations += [
            CommitOperationDelete(name) for name in sorted(stored - {*upload.files, _KEPT})
        ]
    what = "adapter" if upload.is_adapter else "model"
    commit = api.create_commit(
        repo, operations, commit_message=f"Upload {what} with lorakit", revision=revision
    )
    return url, str(commit.oid)
