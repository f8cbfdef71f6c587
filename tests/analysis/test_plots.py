"""The figures of a report."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.adapters.peft.schema import WEIGHTS
from lorakit.errors import AdapterError, UserError
from tests.adapters.directories import write_adapter, write_pair


def test_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base, one = write_pair(tmp_path, "llama", r=20, target_modules=["embed_tokens", "q", "v"])
    two = write_adapter(base, tmp_path / "$two$ \u4e8c", seed=1, r=4, target_modules=["q", "v"])
    folder = tmp_path / "new" / "figures"
    lorakit.inspect(one, two, base=base, plot=folder)
    names = {f"{name}.{end}" for name in ("norms", "ranks", "similarity") for end in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        start = path.read_bytes()[:8]
        assert (
            start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else start.startswith(b"<?xml")
        )
    before = {path: path.read_bytes() for path in folder.iterdir()}
    lorakit.inspect(one, two, base=base, plot=folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_untrained_adapter(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, adapter = write_pair(tmp_path, "llama", scale=0, r=4, target_modules=["q"])
    lorakit.inspect(adapter, adapter, side="left", plot=tmp_path / "figures")
    assert (tmp_path / "figures" / "ranks.png").exists()


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    below, too_long = tmp_path / "file" / "below", tmp_path / ("x" * 300 + "file")
    figures = [tmp_path / name for name in ("file.png", "file.PNG", "file.jpg")]
    for plot in (tmp_path / "file", below, too_long, tmp_path / "link" / "file", *figures):
        with pytest.raises(AdapterError, match=r"^--plot .*file"):
            lorakit.inspect(tmp_path / "adapter", plot=plot)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="contains a control character"):
        lorakit.inspect(tmp_path / "adapter", plot=tmp_path / "a\nb")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AdapterError, match=r"pip install 'lorakit\[plots\]'$"):
        lorakit.inspect(tmp_path / "adapter", plot=tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []


def test_names_with_control_characters(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, plain = write_pair(tmp_path, "llama", r=4, target_modules=["q"])
    odd = tmp_path / "\x1b & <"
    shutil.copytree(plain, odd)
    tensors = load_file(odd / WEIGHTS)
    renamed = {key.replace("q_proj", "q\x1b&"): value for key, value in tensors.items()}
    save_file(renamed, odd / WEIGHTS)
    lorakit.inspect(odd, odd, plot=tmp_path / "figures")
    for path in (tmp_path / "figures").glob("*.svg"):
        ElementTree.parse(path)
