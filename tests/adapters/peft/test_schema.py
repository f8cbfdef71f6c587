"""Wrong types in an adapter's JSON files: errors name the file, key and value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.adapters.peft.schema import CONFIG
from lorakit.errors import AdapterError
from tests.adapters.directories import write_adapter, write_base

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG_FAULTS: list[tuple[str, Any]] = [
    ("alpha_pattern", "x"),
    ("alpha_pattern", {"q": "x"}),
    ("auto_mapping", "x"),
    ("base_model_name_or_path", 7),
    ("base_model_name_or_path", "base\0"),
    ("base_model_name_or_path", "base\nhint"),
    ("base_model_name_or_path", "base\ud800"),
    ("exclude_modules", 7),
    ("layers_pattern", {"x": 1}),
    ("layers_to_transform", ["x"]),
    ("lora_alpha", 10**400),
    ("lora_alpha", float("nan")),
    ("lora_dropout", None),
    ("lora_dropout", 7),
    ("modules_to_save", 7),
    ("modules_to_save", [None]),
    ("modules_to_save", ["["]),
    ("r", 10**400),
    ("r", True),
    ("rank_pattern", {"q": 0}),
    ("revision", 7),
    ("target_modules", 7),
    ("task_type", []),
    ("use_rslora", "x"),
]
SIDECAR_FAULTS: list[tuple[str, Any]] = [
    ("base_dtype", []),
    ("id2label", "x"),
    ("id2label", {"x": "y"}),
    ("method", []),
    ("pad_token_id", "x"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("types")
    base = write_base(folder / "base", "gpt2")
    return base, write_adapter(base, folder / "adapter", target_modules=["q", "v"])


def edited(pair: tuple[Path, Path], folder: Path, name: str, change: Callable[[Any], None]) -> Path:
    (folder / "adapter").mkdir()
    for file in pair[1].iterdir():
        (folder / "adapter" / file.name).write_bytes(file.read_bytes())
    stored = json.loads((folder / "adapter" / name).read_text())
    change(stored)
    (folder / "adapter" / name).write_text(json.dumps(stored))
    return folder / "adapter"


def refused(base: Path, adapter: Path, message: str) -> None:
    out = adapter.parent / "out"
    for action in (
        lambda: lorakit.convert(adapter, out, "lora"),
        lambda: lorakit.merge(base, adapter, out),
        lambda: lorakit.load(base, adapter),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("adapter_config", *fault) for fault in CONFIG_FAULTS]
    + [("lorakit", *fault) for fault in SIDECAR_FAULTS],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_type(
    name: str, key: str, value: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = edited(pair, tmp_path, f"{name}.json", lambda stored: stored.update({key: value}))
    refused(pair[0], adapter, rf"{name}\.json: {key}")


@pytest.mark.parametrize(("method", "targets"), [("intrinsic", ["attention"]), ("bitfit", None)])
def test_an_invalid_pattern_of_any_method(
    method: str, targets: list[str] | None, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    adapter = write_adapter(base, tmp_path / "given", method=method, target_modules=targets)
    path = edited((base, adapter), tmp_path, CONFIG, lambda c: c.update(target_modules="(attn"))
    for action in (
        lambda: lorakit.merge(base, path, tmp_path / "out"),
        lambda: lorakit.load(base, path),
    ):
        with pytest.raises(AdapterError, match=r'adapter_config\.json: target_modules: "\(attn"'):
            action()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, "16", -1, 1.5, float("nan"), 10**30, []], ids=str)
@pytest.mark.parametrize("key", ["start", "stop", "period", "r"])
def test_malformed_parts(key: str, value: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    def change(stored: Any) -> None:
        stored["parts"]["transformer.h.0.attn.c_attn"]["q"][key] = value

    adapter = edited(pair, tmp_path, "lorakit.json", change)
    if key == "r" and value == 10**30:
        refused(pair[0], adapter, "the parts q, v do not cover all")
    elif key == "period" and value == 10**30:
        refused(pair[0], adapter, "one period")
    else:
        refused(
            pair[0], adapter, r"lorakit\.json: parts = .*: allowed: for each module, q, k and v"
        )


@pytest.mark.parametrize("part", [{"stop": 40}, {"period": 16}], ids=str)
def test_parts_that_contradict_each_other(
    part: dict[str, int], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The rows of v are 32 to 48 of 48."""

    def change(stored: Any) -> None:
        stored["parts"]["transformer.h.0.attn.c_attn"]["q"].update(part)

    adapter = edited(pair, tmp_path, "lorakit.json", change)
    refused(pair[0], adapter, "one period, and no overlap")


def test_an_unknown_role(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def change(stored: Any) -> None:
        parts = stored["parts"]["transformer.h.0.attn.c_attn"]
        parts["base_layer"] = parts.pop("q")

    refused(pair[0], edited(pair, tmp_path, "lorakit.json", change), "for each module, q, k and v")


@pytest.mark.parametrize("name", ["adapter_config.json", "lorakit.json"])
def test_json_nested_too_deeply(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = edited(pair, tmp_path, name, lambda stored: None)
    (adapter / name).write_text("[" * 100_000)
    refused(pair[0], adapter, "invalid JSON")


def test_null_is_the_default(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def change(stored: Any) -> None:
        for key in ("revision", "modules_to_save", "use_rslora", "layers_pattern"):
            stored[key] = None

    lorakit.load(pair[0], edited(pair, tmp_path, "adapter_config.json", change))
