"""What is uploaded of a directory: the files of an adapter or a model, and nothing else that it may
contain, such as checkpoints or the optimizer's state."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.merge.checkpoint import INDEX, Checkpoint, read_config
from lorakit.adapters.merge.tokenizer import TEMPLATES, TOKENIZER_FILES
from lorakit.adapters.peft.locate import adapter_directory, is_read_as_adapter
from lorakit.adapters.peft.read import read_adapter_config, read_sidecar
from lorakit.adapters.peft.schema import CARD, CONFIG, SIDECAR, WEIGHTS
from lorakit.errors import AdapterError
from lorakit.export.hub.check import is_local

_ADAPTER = (CONFIG, WEIGHTS, SIDECAR, CARD, *TOKENIZER_FILES)
_MODEL = (
    "config.json", "generation_config.json", INDEX, CARD, "preprocessor_config.json",
    "processor_config.json", *TOKENIZER_FILES,
)  # fmt: skip
#: The line of the front matter, and the name of the adapter's directory in the code of a card.
_BASE_LINE = re.compile(r"^base_model: .*\n", re.MULTILINE)
_USED_DIRECTORY = re.compile(r'load_with_tokenizer\((?:"(?:[^"\\]|\\.)*"), ("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True)
class Upload:
    """``files``: name in the repository -> its content, or the file with it. ``base`` is the base
    model that they name; ``left_out`` are the other files of the directory."""

    directory: Path
    files: dict[str, Path | bytes]
    base: str | None
    left_out: tuple[str, ...]
    is_adapter: bool

    @property
    def size_bytes(self) -> int:
        return sum(
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in self.files.values()
        )


def base_of(directory: str | Path) -> str | None:
    """The base model that the adapter in ``directory`` names; None for a model."""
    path = Path(directory)
    if not (path / CONFIG).is_file():
        return None
    named = read_adapter_config(path).get("base_model_name_or_path")
    return str(named) if named else None


def collect(directory: str | Path, repo: str, base: str | None) -> Upload:
    """Choose the files of the adapter or model in ``directory``; ``base`` replaces the base model
    that they name. The card's code names ``repo`` instead of the directory.

    Raises AdapterError or ModelError if the directory is neither, or incomplete.
    """
    path = Path(directory)
    is_adapter = is_read_as_adapter(path)
    if is_adapter:
        path = adapter_directory(path)
        names = _adapter_files(path)
        base = base or base_of(path)
    else:
        names = _model_files(path)
    files: dict[str, Path | bytes] = {name: path / name for name in names}
    if is_adapter and base is not None and base != base_of(path):
        settings = read_adapter_config(path) | {"base_model_name_or_path": base, "revision": None}
        files[CONFIG] = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    named = base if base is not None and not is_local(base) else None
    files[CARD] = _card(path / CARD, repo, named, is_adapter=is_adapter).encode()
    left_out = sorted(
        f"{item.name}/" if item.is_dir() else item.name
        for item in path.iterdir()
        if item.name not in {name.partition("/")[0] for name in files}
    )
    return Upload(path, dict(sorted(files.items())), base, tuple(left_out), is_adapter)


def _adapter_files(path: Path) -> Iterator[str]:
    read_sidecar(path)  # raises an error for a corrupt file
    if not (path / WEIGHTS).is_file():
        raise AdapterError(f"{path}: incomplete adapter: {WEIGHTS} is missing")
    yield from _existing(path, _ADAPTER)


def _model_files(path: Path) -> Iterator[str]:
    settings = read_config(path)
    with Checkpoint(path) as checkpoint:
        yield from sorted(file.relative_to(path).as_posix() for file in checkpoint.files)
    yield from _existing(path, _MODEL)
    if settings.get("auto_map"):  # code of the model's own, which loads with it
        yield from sorted(file.name for file in path.glob("*.py"))


def _existing(path: Path, names: tuple[str, ...]) -> Iterator[str]:
    yield from (name for name in names if (path / name).is_file())
    yield from sorted(f"{TEMPLATES}/{file.name}" for file in (path / TEMPLATES).glob("*.jinja"))


def _card(file: Path, repo: str, base: str | None, *, is_adapter: bool) -> str:
    """The card for the Hub: a base that the Hub knows or none, and code that names ``repo``."""
    line = f"base_model: {json.dumps(base, ensure_ascii=False)}\n" if base else ""
    if not file.is_file():
        library = "peft" if is_adapter else "transformers"
        return f"---\n{line}library_name: {library}\ntags:\n- lorakit\n---\n\n# {repo}\n"
    text = file.read_text(encoding="utf-8", errors="replace")
    if is_adapter:
        text = _BASE_LINE.sub(lambda _: line, text, count=1)
    if (found := _USED_DIRECTORY.search(text)) is None:
        return text
    directory = json.loads(found[1])
    for written in (json.dumps, lambda name, **_: f" {shlex.quote(name)}"):
        text = text.replace(
            written(directory, ensure_ascii=False), written(repo, ensure_ascii=False)
        )
    return text
