"""Unknown keys: where the user probably meant to go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorakit import registry
from lorakit.recipe.faults import Fault, nearest
from lorakit.recipe.sections import ModelSection, Recipe, TrainSection

#: Names of other tools, and short ones, that are too far from ours to be found by likeness.
SYNONYMS = {
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "bs": "per_device_batch_size",
    "train_batch_size": "per_device_batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "lr_scheduler_type": "lr_scheduler",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "base_model": "name_or_path",
    "torch_dtype": "dtype",
    "dataset": "path",
    "lora_target": "target_modules",
    "layers_to_transform": "layers",
}


def unknown_sections(data: Mapping[str, object]) -> list[Fault]:
    """A fault for each top-level key that is no section."""
    known = tuple(Recipe.model_fields)
    faults = []
    for key in data:
        if key in known:
            continue
        place = _elsewhere(key, "")
        near = nearest(key, known)
        hint = f"; did you mean {near!r}?" if near else f"; {place}" if place else ""
        faults.append(Fault((key,), f"unknown section{hint}", allowed=", ".join(known)))
    return faults


def unknown_key(section: str, key: str, value: object, known: Collection[str]) -> Fault:
    """The fault of a key that ``section`` does not have, with the nearest that there is."""
    hint = _hint(section, key, known)
    message = f"unknown key; {hint}" if hint else "unknown key"
    return Fault((section, key), message, value, True, ", ".join(known))


def _hint(section: str, key: str, known: Collection[str]) -> str | None:
    if place := _elsewhere(key, section):
        kin = [repr(name) for name in known if name.endswith(f"_{key}")]
        return f"did you mean {' or '.join(kin)}? {place}" if kin else place
    synonym = SYNONYMS.get(key, "")
    if synonym and synonym not in known and (place := _elsewhere(synonym, section)):
        return f"did you mean {synonym!r}? {place}"
    near = synonym if synonym in known else nearest(key, known)
    return f"did you mean {near!r}?" if near else None


def _elsewhere(key: str, section: str) -> str | None:
    """Where ``key`` is known outside of ``section`` as it stands."""
    for name, part in (("model", ModelSection), ("train", TrainSection)):
        if name != section and key in part.model_fields:
            return f"it belongs under {name}"
    for name, kind, owned in (
        ("adapter", "method", registry.methods()),
        ("task", "task", registry.tasks()),
    ):
        owners = [owner for owner, part in owned.items() if key in part.Config.model_fields]
        if owners and name != section:
            return f"it belongs under {name}"
        if owners:
            return f"it is a key of the {kind}{'s' * (len(owners) > 1)} {', '.join(owners)}"
    return None
