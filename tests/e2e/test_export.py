"""The command ``export``: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.cli.main import run
from tests.adapters.directories import write_adapter
from tests.export.bases import write_base

pytestmark = pytest.mark.filterwarnings("ignore")


def exported(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    code = run(["export", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    capsys.readouterr()
    assert run(["export", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", r=4)
    file = tmp_path / "m.gguf"
    assert exported(capsys, base, file, "--to", "gguf") == (
        f"{file}: model, 21 tensors, f32; {file.stat().st_size / 1e6:.1f} MB\n"
    )
    report = json.loads(exported(capsys, adapter, tmp_path / "a.gguf", "--to", "gguf", "--json"))
    assert (report["kind"], report["tensors"], report["dtype"]) == ("adapter", 16, "f32")


def test_gguf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "llama")
    out = tmp_path / "m.gguf"
    assert "--to is missing; allowed: " in refused(capsys, base, out)
    assert "--to = ggml: allowed: " in refused(capsys, base, out, "--to", "ggml")
    assert "OUT.gguf is missing" in refused(capsys, base, "--to", "gguf")
    assert f"{tmp_path / 'none'}: no such directory" in refused(
        capsys, tmp_path / "none", out, "--to", "gguf"
    )
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: not an adapter" in refused(
        capsys, tmp_path / "empty", out, "--to", "gguf"
    )
    (base / "model.safetensors").write_bytes(b"x" * 20)
    message = refused(capsys, base, out, "--to", "gguf")
    assert message.startswith(f"error: {base / 'model.safetensors'}: corrupt or truncated")
    assert not out.exists()
