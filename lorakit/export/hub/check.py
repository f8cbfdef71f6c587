"""Whether a push to the Hub can succeed, found out before hours of training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.base_model import is_same_name
from lorakit.distributed.group import init_process_group, is_main
from lorakit.distributed.processes import run_on_main
from lorakit.errors import UserError, listed, shown
from lorakit.export.hub.client import hub_api, requests
from lorakit.models.hub import is_missing_path
from lorakit.notes import Say

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"\w(?:[\w./-]*\w)?")
#: Files that a repository may have before anything is pushed.
_INITIAL = (".gitattributes", "README.md", "LICENSE")
_CAN_WRITE = ("admin", "write", "contributor")


@dataclass(frozen=True)
class HubTarget:
    """Where to push: ``repo`` is NAMESPACE/NAME, ``revision`` a branch, by default main. A new
    repository is ``private``; with ``overwrite``, the files of an existing one are replaced."""

    repo: str
    private: bool = False
    revision: str | None = None
    overwrite: bool = False


def check_push(target: HubTarget, base: str | None, say: Say) -> None:
    """Check the names, the access token, and a repository that exists already; in the main process
    of a launcher. Nothing is changed on the Hub.

    ``base`` is the base model of what will be pushed, and ``say`` receives notes. Raises UserError
    for what the user can correct, and HubError if the Hub cannot be reached.
    """
    check_target(target)
    init_process_group()
    run_on_main(lambda: check_repository(hub_api(target.repo), target, base))
    if is_main() and (note := local_base_note(base)) is not None:
        say(f"warning: {note}")


def check_target(target: HubTarget) -> None:
    """Raise UserError for the name of a repository or branch that the Hub does not allow."""
    repo, revision = target.repo, target.revision
    forbidden = "--" in repo or ".." in repo or repo.endswith(".git") or len(repo) > 96
    if not _REPO.fullmatch(repo) or forbidden:
        raise UserError(
            f"{repo}: allowed: NAMESPACE/NAME of letters, digits, -, _ and ., at most 96 characters"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UserError(f"{repo}: revision = {shown(revision)}: allowed: the name of a branch")


def check_repository(api: HfApi, target: HubTarget, base: str | None) -> None:
    """Raise UserError if the token cannot write to the repository, or if its contents are not those
    of an adapter of ``base``."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with requests(target.repo):
        check_token(api.whoami(), target.repo)
        try:
            info = api.model_info(target.repo)
        except RepositoryNotFoundError:
            return
    if target.private and info.private is False:
        raise UserError(
            f"{target.repo}: exists and is public",
            hint="change that in its settings on the Hub, or leave out --private",
        )
    if not target.overwrite:
        _check_base(target.repo, info, base)


def check_token(user: Mapping[str, Any], repo: str) -> None:
    """Raise UserError unless the token of ``user`` (whoami) may write into the namespace."""
    namespace = repo.partition("/")[0]
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(f"{repo}: the access token is read-only", hint="use one with write access")
    organizations = [
        str(organization.get("name"))
        for organization in user.get("orgs") or ()
        if organization.get("roleInOrg", "write") in _CAN_WRITE
    ]
    own = [str(user.get("name")), *organizations]
    if namespace not in own:
        raise UserError(
            f"{repo}: the access token cannot write to {namespace}; allowed: {listed(own)}"
        )
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and not any(
        (scope.get("entity") or {}).get("name") in (namespace, repo)
        and "repo.write" in (scope.get("permissions") or ())
        for scope in scopes or ()
    ):
        raise UserError(
            f"{repo}: the access token cannot write repositories of {namespace}",
            hint="give it the permission repo.write",
        )


def is_local(base: str) -> bool:
    """Whether a base model is a directory of this computer, not a repository on the Hub."""
    return Path(base).is_dir() or is_missing_path(base)


def local_base_note(base: str | None) -> str | None:
    """What to do about a base model that nobody else can load; None if it is on the Hub."""
    if base is None or not is_local(base):
        return None
    return (
        f"the base model {base} is a local directory, which others do not have; hint: lorakit "
        "export ADAPTER --to hub --base NAMESPACE/NAME names the base as on the Hub"
    )


def _check_base(repo: str, info: Any, base: str | None) -> None:
    names = {item.rfilename for item in info.siblings or ()}
    if names <= {*_INITIAL}:
        return
    named = (info.card_data or {}).get("base_model") or []
    found = [named] if isinstance(named, str) else [str(name) for name in named]
    peft = ((info.config or {}).get("peft") or {}).get("base_model_name_or_path")
    found += [peft] if peft else []
    if base is not None and any(is_same_name(base, name) for name in found):
        return
    what = f"an adapter of {listed(dict.fromkeys(found))}" if found else "other files"
    raise UserError(
        f"{repo}: exists and has {what}, and {base or 'this model'} is not its base",
        hint="choose another name, or pass --overwrite, which replaces its files",
    )
