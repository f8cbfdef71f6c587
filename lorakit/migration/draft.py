"""A recipe in the making, and what its file loses or changes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.errors import UserError, shown
from lorakit.recipe.peers.counterpart import Counterpart
from lorakit.recipe.sections import TrainSection

#: Keys of ``adapter`` that other tools spell in the same way.
_SAME_IN_ADAPTER = (
    "lora_alpha", "lora_dropout", "use_rslora", "loraplus_lr_ratio", "loraplus_lr_embedding",
    "init_from",
)  # fmt: skip
_SAME_IN_MODEL = ("trust_remote_code",)
#: Values that turn a setting off.
_OFF: tuple[object, ...] = (None, False, "", 0, (), [], {})


class Draft:
    """``sections`` is the recipe so far. ``unsupported`` are keys without counterpart, ``changed``
    those whose meaning differs, ``ignored`` those that a recipe does not need."""

    def __init__(self, given: Mapping[str, Any], counterparts: Mapping[str, Counterpart]) -> None:
        self.given = given
        self.sections: dict[str, dict[str, Any]] = {
            name: {} for name in ("model", "adapter", "task", "train")
        }
        self.unsupported: list[str] = []
        self.changed: list[str] = []
        self.ignored: list[str] = []
        self._counterparts = counterparts
        self._done: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, which ``translate_rest`` then skips."""
        self._done.add(key)
        value = self.given.get(key)
        return default if value is None else value

    def number(self, key: str) -> float | None:
        """``take`` for a number. Raises UserError for another value."""
        value = self.take(key)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        raise refuse(key, value, "wrong type; allowed: a number")

    def text(self, key: str, default: str | None = None) -> str | None:
        """``take`` for a text. Raises UserError for another value."""
        value = self.take(key, default)
        if value is None or isinstance(value, str):
            return value
        raise refuse(key, value, "wrong type; allowed: text")

    def names(self, key: str) -> list[str]:
        """``take`` for names in a list, or separated by commas. Raises UserError otherwise."""
        value = self.take(key) or []
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list) and all(isinstance(part, (str, int, float)) for part in parts):
            return [text for part in parts if (text := str(part).strip())]
        raise refuse(key, value, "wrong type; allowed: a list of names, or names and commas")

    def get(self, key: str) -> Any:
        section, _, name = key.partition(".")
        return self.sections[section].get(name)

    def set(self, key: str, value: Any) -> None:
        section, _, name = key.partition(".")
        self.sections[section][name] = value

    def default(self, key: str, value: Any) -> None:
        """Set ``key`` unless it is set."""
        section, _, name = key.partition(".")
        self.sections[section].setdefault(name, value)

    def drop(self, *keys: str) -> None:
        for key in keys:
            section, _, name = key.partition(".")
            self.sections[section].pop(name, None)

    def lose(self, key: str, value: Any, note: str) -> None:
        self.unsupported.append(f"{key}: {shown(value)}: {note}")

    def change(self, key: str, value: Any, note: str) -> None:
        self.changed.append(f"{key}: {shown(value)}: {note}")

    def translate_rest(self) -> None:
        """Translate, key by key, what has not been taken."""
        for key, value in self.given.items():
            if key not in self._done:
                self._translate(key, value)

    def _translate(self, key: str, value: Any) -> None:
        found = self._counterparts.get(key)
        is_off = value in _OFF
        if value is None or value == "":
            return
        if found is None:
            self._same_name(key, value, is_off)
        elif found.needless:
            self.ignored.append(key)
        elif found.translates(value):
            assert found.key is not None
            self.set(found.key, found.value_of(value))
            if found.note and not found.listed_only:
                self.change(key, value, found.note)
            if note := found.differs.get(str(value)):
                self.change(key, value, note)
        elif not is_off:
            see = f"see {found.key}" if found.key else ""
            self.lose(key, value, "; ".join(part for part in (see, found.note) if part))

    def _same_name(self, key: str, value: Any, is_off: bool) -> None:
        if key in TrainSection.model_fields:
            self.set(f"train.{key}", value)
        elif key in _SAME_IN_ADAPTER:
            self.set(f"adapter.{key}", value)
        elif key in _SAME_IN_MODEL:
            self.set(f"model.{key}", value)
        elif not is_off:
            self.lose(key, value, "lorakit has no such key")


def refuse(key: str, value: Any, note: str) -> UserError:
    """The error for a file that no recipe corresponds to."""
    return UserError(f"{key} = {shown(value)}: {note}")
