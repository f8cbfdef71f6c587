"""Finds the method that reads an adapter. The code of a user's method runs only if it is named."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.adapters.peft.schema import MERGE_WITH_PEFT, ONLY_PEFT
from lorakit.errors import AdapterError, shown
from lorakit.methods.base import Method
from lorakit.notes import Say
from lorakit.user_code import code_identity, is_code

#: What to do about an adapter of a user's method whose code has not run. ``FILE.py:CLASS`` is
#: replaced by the name of the method.
NAME_METHOD = "--method FILE.py:CLASS, or method= in Python, runs its code"
#: PEFT's types that add trained inputs or layers, which no weight of the base can take in.
_NOT_MERGEABLE = frozenset({
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY",
    "PREFIX_TUNING", "PROMPT_TUNING", "XLORA",
})  # fmt: skip


def find_method(
    config: Mapping[str, Any], sidecar: Mapping[str, Any], where: str, say: Say, hint: str
) -> Method:
    """The method that wrote the adapter, else the one of that ``peft_type``.

    This does not run the code of a user's method: ``registry.method`` must have loaded it before.
    Raises AdapterError with the ``hint`` otherwise. ``say`` receives a warning if the code has
    changed since.
    """
    wrote, peft_type = str(sidecar.get("method") or ""), config.get("peft_type")
    users: dict[tuple[str, str], Method] = registry.user_methods()
    known: dict[Any, Method] = {**registry.methods(), **users}
    own = _user_method(wrote, users, where, say, hint) if is_code(wrote) else known.get(wrote)
    if own is not None and sidecar.get("method_digest", own.digest) != own.digest:
        say(f"warning: {where}: the code of {own.name} has changed since the adapter was trained")
    if own is not None and own.peft_type == peft_type and not own.folds:
        return own
    if "peft_type" in config and (found := [m for m in known.values() if m.reads(config)]):
        return found[0]
    allowed = ", ".join(sorted({method.peft_type for method in known.values()} - {"LORAKIT"}))
    if not wrote and isinstance(peft_type, str) and peft_type not in ("", "LORAKIT"):
        hint = ONLY_PEFT if peft_type in _NOT_MERGEABLE else MERGE_WITH_PEFT
    raise AdapterError(
        f"{where}: peft_type = {shown(peft_type)}: allowed: {allowed}, or that of a method of your "
        f"own; hint: {hint}"
    )


def _user_method(
    wrote: str, users: Mapping[tuple[str, str], Method], where: str, say: Say, hint: str
) -> Method:
    """The user's method ``wrote``, FILE.py:CLASS, among those that were named in this process: the
    one of that file, else the only one of that class, whose file may have moved. Raises
    AdapterError if there is none, or more than one."""
    file, name = code_identity(wrote)
    if (file, name) in users:
        return users[file, name]
    candidates = [method for (_, own_name), method in users.items() if own_name == name]
    if len(candidates) == 1:
        say(f"{where}: trained with {wrote}, read with {candidates[0].name}")
        return candidates[0]
    others = f", which is none of {', '.join(m.name for m in candidates)}" if candidates else ""
    hint = hint.replace("FILE.py:CLASS", wrote)
    raise AdapterError(f"{where}: trained with {wrote}{others}; hint: {hint}")


def merge_command(base: str | None, adapter: str | Path, method: str) -> str:
    """The command that merges an adapter of ``method``."""
    option = f" --method {method}" if is_code(method) else ""
    return f"lorakit merge {base or 'BASE'} {adapter} OUT{option}"


def run_method_file(method: str | PathLike[str] | None) -> None:
    """Run the file of a user's method, ``FILE.py:CLASS``, so that its adapters can be read; None
    does nothing. Raises AdapterError for another form, UserError for what the file lacks."""
    if method is None:
        return
    spec = fspath(method)
    if not is_code(spec):
        raise AdapterError(f"method = {shown(spec)}: allowed: FILE.py:CLASS, a method of your own")
    registry.method(spec)
