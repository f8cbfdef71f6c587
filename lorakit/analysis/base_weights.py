"""The base's weight of each matrix that an adapter updates, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lorakit.adapters.base_model import base_section, other_base_note
from lorakit.adapters.merge.checkpoint import Checkpoint, local_directory, read_config
from lorakit.adapters.merge.quantized import open_checkpoint
from lorakit.adapters.merge.run import resolve_base
from lorakit.adapters.merge.updates import LowRankUpdate, ResolvedBase, Update, Weighted
from lorakit.adapters.peft.read import AdapterFiles, is_finite
from lorakit.errors import AdapterError
from lorakit.notes import Say

#: Receives a module's name in the base, and its W (out_features, in_features).
Visit = Callable[[str, Tensor], None]


def visit_base(
    base: str, files: AdapterFiles, visit: Visit, say: Say, trust_remote_code: bool = False
) -> None:
    """Call ``visit`` for every matrix that the adapter changes, in the order of the base's files.

    Only one matrix, or group of matrices that are stored together, is in memory. Raises ModelError
    and AdapterError for a base that is missing, quantized or does not fit the adapter.
    """
    section = base_section(base, files, trust_remote_code)
    directory = local_directory(section)
    settings = read_config(directory)
    with open_checkpoint(directory, settings) as checkpoint:
        resolved = resolve_base(section, settings, checkpoint, [Weighted(files)])
        for stored, names in _stored_names(resolved).items():
            _check_float(checkpoint, stored)
            W = checkpoint.read(stored)
            for name in names:
                _visit(visit, resolved.updates[name], name, W)
        weights = _weights(resolved)
        for group in resolved.groups:
            if changed := weights.intersection(group.targets):
                for source in group.sources:
                    _check_float(checkpoint, source)
                values = {source: checkpoint.read(source) for source in group.sources}
                group.converted(values, _finish(visit, resolved.updates, changed))
    if note := other_base_note(section, files):
        say(note)


def _weights(resolved: ResolvedBase) -> set[str]:
    return {name for name in resolved.updates if not name.endswith(".bias")}


def _stored_names(resolved: ResolvedBase) -> dict[str, list[str]]:
    """Stored tensor -> the adapted parameters that have its values: several if they are tied."""
    weights = _weights(resolved)
    tied = {name: names for names in resolved.ties for name in names}
    found: dict[str, list[str]] = {}
    for stored, parameter in resolved.plain.items():
        for name in tied.get(parameter, (parameter,)):
            if name in weights and name not in found.get(stored, ()):
                found.setdefault(stored, []).append(name)
    return found


def _finish(
    visit: Visit, updates: Mapping[str, Sequence[Update]], changed: set[str]
) -> Callable[[str, Tensor], Tensor]:
    def finish(name: str, W: Tensor) -> Tensor:
        if name in changed:
            _visit(visit, updates[name], name, W)
        return W

    return finish


def _visit(visit: Visit, updates: Sequence[Update], name: str, W: Tensor) -> None:
    if not is_finite(W):
        raise AdapterError(f"base: {name}: contains NaN or infinite values")
    [update] = updates
    transposed = not isinstance(update, LowRankUpdate) and update.layer.kind != "linear"
    visit(name.removesuffix(".weight"), W.t() if transposed else W)


def _check_float(checkpoint: Checkpoint, stored: str) -> None:
    tensor = checkpoint.tensors[stored]
    if not tensor.is_float:
        raise AdapterError(
            f"base: {tensor.file}: {stored} is {tensor.code}: quantized weights cannot be compared "
            "with an update; hint: pass the original weights"
        )
