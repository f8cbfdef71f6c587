"""Mutated adapter directories of lorakit and PEFT: the command works, or refuses in one line."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from lorakit.cli.main import run
from tests.adapters.directories import fresh, write_adapter, write_base
from tests.fuzz.mutate import assert_plain, limited, listing, mutate_file, run_cases


def forms(folder: Path) -> tuple[Path, list[Path]]:
    """A base, and adapters for it as lorakit and PEFT write them."""
    base = write_base(folder / "base")
    keys = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    peft = folder / "peft"
    get_peft_model(fresh(base), LoraConfig(**keys)).save_pretrained(peft)
    ours = [
        write_adapter(base, folder / method, method=method)
        for method in ("lora", "dora", "adalora", "moslora")
    ]
    return base, [peft, peft, *ours]


@pytest.mark.parametrize(("count", "seed"), [(40, 1), pytest.param(500, 2, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_mutated_adapters(
    count: int, seed: int, in_tmp: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    temporary = in_tmp / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    base, adapters = forms(in_tmp)
    adapter, out = in_tmp / "adapter", in_tmp / "out"
    named = (str(adapter), str(out))
    codes = {0: 0, 2: 0}

    def case(number: int) -> None:
        draw = random.Random(f"{seed}.{number}")
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(draw.choice(adapters), adapter)
        names = ["adapter_config.json", "adapter_model.safetensors", "lorakit.json"]
        present = [adapter / name for name in names if (adapter / name).exists()]
        for file in draw.sample(present, draw.choice([1, 1, 2])):
            mutate_file(file, draw)
        before = {k: v for k, v in listing(in_tmp).items() if not k.startswith(named)}
        capsys.readouterr()
        command = ["merge", str(base), str(adapter), str(out)]
        chance = draw.random()
        if chance < 0.3:
            command = ["convert", str(adapter), str(out), "--to", "lora"]
        elif chance < 0.45:
            command = ["inspect", str(adapter), str(adapters[0]), "--base", str(base)]
        with limited():
            code = run(command)
        streams = capsys.readouterr()
        assert code in (0, 2), (number, streams.err)
        assert_plain(streams.out + streams.err)
        if code:
            (_,) = [x for x in streams.err.splitlines() if x.startswith("error: ")]
            assert not out.exists(), number
        after = {k: v for k, v in listing(in_tmp).items() if not k.startswith(named)}
        assert after == before, number
        codes[code] += 1

    run_cases(count, case)
    assert min(codes.values()) > count // 50
