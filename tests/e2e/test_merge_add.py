"""``lorakit merge BASE ADAPTER OUT --add OTHER:W`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.cli.main import run
from tests.adapters.directories import write_adapter, write_base


@pytest.fixture
def files(in_tmp: Path) -> Path:
    """Write ``base`` and the adapters ``a``, ``b`` and ``b:c`` to the working directory."""
    base = write_base(Path("base"))
    for seed, name in enumerate(("a", "b", "b:c")):
        write_adapter(base, Path(name), seed=seed)
    return in_tmp


def merged(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    """Return stdout and the output directory."""
    code = run(["merge", "base", "a", "out", "--overwrite", *options])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, "out"


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run(["merge", "base", "a", "new", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, "one line"
    assert err.startswith("error: ")
    assert not Path("new").exists()
    return err


def values(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_added_adapters_are_reported(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = merged(capsys, "--add", "b:0.5", "--add", "b:c", "--add", "b:c:-1", "--weight", "2")
    assert "weight 2; added 0.5 x b; added 1 x b:c; added -1 x b:c" in out
    out, _ = merged(capsys, "--add", "b:5e-1", "--json")
    report = json.loads(out)
    assert report["weight"] == 1.0
    assert report["added"] == [{"adapter": "b", "weight": 0.5}]
    out, _ = merged(capsys)
    assert "added" not in out
    assert "weight" not in out


def test_a_directory_whose_name_ends_in_a_weight(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless a directory with the name before the colon exists."""
    Path("b:c").rename("c:2")
    out, _ = merged(capsys, "--add", "c:2", "--add", "c:2:0.5")
    assert "added 1 x c:2; added 0.5 x c:2" in out


def test_weights(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = values("base")[name]
    found = {}
    for key, options in {
        "a": (),
        "-a": ("--weight", "-1"),
        "b": ("--weight", "0", "--add", "b"),
        "a + b / 2": ("--add", "b:0.5"),
        "a - b": ("--add", "b:-1"),
    }.items():
        merged(capsys, *options)
        found[key] = values("out")[name] - plain
    close = {"-a": -found["a"], "a + b / 2": found["a"] + found["b"] / 2,
             "a - b": found["a"] - found["b"]}  # fmt: skip
    for key, want in close.items():
        torch.testing.assert_close(found[key], want, atol=1e-6, rtol=0)
        assert want.abs().max() > 1e-2


def test_other_combinations(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = merged(capsys, "--add", "b:0.5", "--method", "ties", "--density", "0.5")
    assert "; combined by ties; added 0.5 x b" in out
    own = values("out")
    out, _ = merged(capsys, "--add", "b:0.5", "--method", "dare", "--density", "0.9", "--seed", "3",
                    "--json")  # fmt: skip
    assert json.loads(out)["combination"] == "dare_linear"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(values("out")[name], own[name])
    out, _ = merged(capsys, "--add", "b", "--method", "cat")
    assert "combined" not in out


def test_invalid_input_is_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--add", "b:nan"), "b: weight = nan: allowed: a finite number"),
        (("--add", "b:inf"), "b: weight = inf: allowed: a finite number"),
        (("--weight", "nan"), "a: weight = nan: allowed: a finite number"),
        (("--add", "none:0.5"), "none: no such adapter directory"),
        (("--add", "b:half"), "b:half: no such adapter directory"),
        (("--add", ":0.5"), "without an adapter directory"),
        (("--add", "base:1"), "base: a model, not an adapter"),
        (("--add", "b", "--method", "tie"), "unknown (did you mean 'ties'?); allowed: cat, linear"),
        (("--add", "b", "--method", "ties"), "density: ties needs the share of values to keep"),
        (("--add", "b", "--density", "0.5"), "density = 0.5: not used by cat"),
    ):
        assert message in refused(capsys, *options)
