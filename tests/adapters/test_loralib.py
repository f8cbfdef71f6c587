"""loralib checkpoints, read and written: trained layers, options, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit
from lorakit.adapters.peft.schema import CONFIG
from lorakit.errors import AdapterError
from tests.adapters.directories import fresh, logits, peft_logits, write_base, write_pair
from tests.families import token_ids

pytestmark = pytest.mark.filterwarnings("ignore")


def test_loralib_layers_take_the_file(tmp_path: Path) -> None:
    """Build the layers from the r, lora_alpha and enable_lora in the metadata, then load."""
    base, adapter = write_pair(tmp_path, "gpt2", r=4, lora_alpha=12, target_modules=["q", "v"])
    report = lorakit.convert(adapter, tmp_path / "out", "loralib")
    assert report.path == tmp_path / "out" / "lora.safetensors"
    assert (report.r, report.lora_alpha) == (4, 12)
    with safe_open(report.path, "pt") as opened:
        told = {k: json.loads(v) for k, v in opened.metadata().items() if k != "format"}
    model = fresh(base)
    for name, enable in told["enable_lora"].items():
        rows = lorakit.MergedLinear(
            16, 48, r=told["r"], lora_alpha=told["lora_alpha"], enable_lora=enable,
            fan_in_fan_out=told["fan_in_fan_out"],
        )  # fmt: skip
        rows.load_state_dict(model.get_submodule(name).state_dict(), strict=False)
        model.set_submodule(name, rows)
    missing = model.load_state_dict(load_file(report.path), strict=False)
    assert missing.unexpected_keys == []
    want = logits(lorakit.load(base, adapter))
    torch.testing.assert_close(logits(model.eval()), want, atol=1e-6, rtol=0)


def test_equal_adapters_give_equal_files(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "gpt2", r=2, target_modules=["q", "v"])
    files = [tmp_path / f"{n}.safetensors" for n in range(5)]
    for file in files:
        lorakit.convert(adapter, file, "loralib")
    assert len({file.read_bytes() for file in files}) == 1


def trained(model: nn.Module, layers: dict[str, nn.Module], bias: Any = "none") -> nn.Module:
    """Return ``model`` with loralib's layers, trained for a few steps."""
    for name, layer in layers.items():
        plain = model.get_submodule(name)
        layer.load_state_dict(plain.state_dict(), strict=False)
        model.set_submodule(name, layer)
    lorakit.mark_only_lora_as_trainable(model, bias=bias)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(4):
        ids = token_ids(4, seed=step)
        labels = ids[:, 0] % 3 if hasattr(model, "classifier") else ids
        model.train()(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def gpt2_layers(**enable: Any) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    merged = {"r": 2, "lora_alpha": 6, "fan_in_fan_out": True, "enable_lora": [True, False, True]}
    return {
        "transformer.wte": lorakit.Embedding(64, 16, r=3, lora_alpha=6),
        "transformer.h.0.attn.c_attn": lorakit.MergedLinear(16, 48, **(merged | enable)),
        "transformer.h.1.attn.c_proj": lorakit.Linear(
            16, 16, r=2, lora_alpha=6, fan_in_fan_out=True
        ),
    }


GPT2_OPTIONS: dict[str, Any] = {
    "lora_alpha": 6, "enable_lora": ["q,v"], "fan_in_fan_out": True, "say": lambda text: None
}  # fmt: skip


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_trained_loralib_model(bias: Any, tmp_path: Path) -> None:
    """PEFT reproduces the logits of Linear, MergedLinear and Embedding."""
    base = write_base(tmp_path / "base", "gpt2")
    model = trained(fresh(base), gpt2_layers(), bias)
    assert (logits(model) - logits(fresh(base))).abs().max() > 1e-2
    torch.save({"model_state_dict": lorakit.lora_state_dict(model, bias)}, tmp_path / "l.pt")
    lorakit.convert(
        tmp_path / "l.pt", tmp_path / "out", "peft", base_model=str(base), **GPT2_OPTIONS
    )
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "out"), logits(model), atol=1e-5, rtol=0
    )
    ours = lorakit.load(None, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "out" / CONFIG).read_text()).get("bias", "none") == bias
    if bias == "none":
        lorakit.convert(tmp_path / "l.pt", tmp_path / "plain", "lora", **GPT2_OPTIONS)
        torch.testing.assert_close(
            peft_logits(base, tmp_path / "plain"), logits(model), atol=1e-5, rtol=0
        )


def test_a_trained_loralib_classifier(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "roberta")
    torch.manual_seed(0)
    names = [
        f"roberta.encoder.layer.{i}.attention.self.{q}" for i in (0, 1) for q in ("query", "value")
    ]
    model = trained(fresh(base), {n: lorakit.Linear(16, 16, r=2, lora_alpha=3) for n in names})
    head = {f"classifier.{k}": v for k, v in model.classifier.state_dict().items()}
    stored = {f"module.{k}": v for k, v in {**lorakit.lora_state_dict(model), **head}.items()}
    save_file(stored, tmp_path / "l.safetensors")
    notes: list[str] = []
    lorakit.convert(
        tmp_path / "l.safetensors", tmp_path / "out", "peft", lora_alpha=3, base_model=str(base),
        say=notes.append,
    )  # fmt: skip
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert [note.split(",")[0] for note in notes] == [
        "removed the prefix module. of all names (DistributedDataParallel)",
        "task_type = SEQ_CLS",
    ]
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "out"), logits(model), atol=1e-5, rtol=0
    )
    ours = lorakit.load(base, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)


def test_one_enabled_projection_is_named(tmp_path: Path) -> None:
    """The shapes equal those of a Linear, so only the option distinguishes the two."""
    base = write_base(tmp_path / "base", "gpt2")
    layers = gpt2_layers(enable_lora=[False, False, True])
    model = trained(fresh(base), layers)
    torch.save(lorakit.lora_state_dict(model), tmp_path / "l.bin")
    options = GPT2_OPTIONS | {"enable_lora": ["c_attn=0,0,1"]}
    lorakit.convert(tmp_path / "l.bin", tmp_path / "out", "peft", **options)
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "out"), logits(model), atol=1e-5, rtol=0
    )


def stored(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


MERGED = {"a__lora_A": (4, 6), "a__lora_B": (8, 2)}


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (stored(**MERGED), {}, "2 projections enabled; hint: pass which ones as --enable-lora"),
        (stored(**MERGED), {"enable_lora": ["1,1,1"]}, "do not fit the 3 projections of r = 2"),
        (stored(**MERGED), {"enable_lora": ["q,x"]}, "--enable-lora = q,x: allowed: "),
        (stored(**MERGED), {"enable_lora": ["b=q,v"]}, "pass which ones as --enable-lora"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"enable_lora": ["q,v"]}, "no adapted module is fused"),
        (stored(a__lora_A=(3, 6), a__lora_B=(8, 2)), {"enable_lora": ["a=1,0"]}, "do not fit the 1 projections"),
        (stored(a__lora_A=(3, 6), a__lora_B=(8, 2)), {}, "A must have as many rows as B has columns"),
        (stored(a__lora_A=(2, 6)), {}, r"missing tensor: a\.lora_B"),
        (stored(a__lora_A=(2,), a__lora_B=(2,)), {}, "allowed: a matrix"),
        (stored(a__lora_A__weight=(2, 6)), {}, r"a\.lora_A\.weight: not a name of loralib"),
        (stored(a__bias=(2,)), {}, r"it has no MODULE\.lora_A"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2), a__weight=(8, 6)), {}, r"a\.weight: the file contains a whole model"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"embedding": ["b"]}, "--embedding = b: no adapted"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"lora_alpha": 0}, "--lora-alpha = 0: allowed"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"task_type": "X"}, "--task-type = X: allowed"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"rank": 8}, "--rank = 8: allowed: with --to lora"),
        ({"a.lora_A": torch.full((2, 6), torch.inf)}, {}, r"a\.lora_A: contains NaN or infinite"),
        (stored(a__lora_A=(6, 12), a__lora_B=(18, 6), a__bias=(6,)), {}, "a Conv2d cannot be converted"),
        (stored(a__lora_A=(6, 12), a__lora_B=(18, 6), a__conv__bias=(6,)), {}, "a: a convolution, judging by its name"),
        (stored(a__conv1__lora_A=(6, 12), a__conv1__lora_B=(18, 6)), {}, r"a\.conv1: a convolution, judging by its"),
        ({"a.lora_A": torch.ones(2, 6).to_sparse()}, {}, r"a\.lora_A: sparse or without values"),
        ({"a.lora_A": torch.ones(2, 6, device="meta")}, {}, r"a\.lora_A: sparse or without values"),
        ({3: torch.ones(2, 6)}, {}, "3: not a state dict: a name must be a string"),
        ({"a.lora_A": 3}, {}, r"\"a\.lora_A\": not a tensor: int"),
        ([1], {}, "not a state dict: found list"),
    ],
)  # fmt: skip
def test_checkpoints_that_cannot_be_read(
    tensors: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.save(tensors, tmp_path / "l.pth")
    with pytest.raises(AdapterError, match=message) as caught:
        lorakit.convert(tmp_path / "l.pth", tmp_path / "out", "peft", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "NaN"),
        ("lora_alpha", "0"),
        ("lora_alpha", "1" + "0" * 400),
        ("enable_lora", '{"a": ["x"]}'),
        ("embedding", "[[1]]"),
        ("base_model", "7"),
        ("task_type", "[]"),
    ],
)
def test_metadata_that_lorakit_did_not_write(key: str, value: str, tmp_path: Path) -> None:
    told = {"lorakit_version": '"1"', "lora_alpha": "1", "embedding": "[]", "enable_lora": "{}",
            "base_model": "null", "task_type": "null"}  # fmt: skip
    file = tmp_path / "l.safetensors"
    save_file(stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), file, metadata=told)
    lorakit.convert(file, tmp_path / "well", "peft")
    save_file(stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), file, metadata=told | {key: value})
    with pytest.raises(AdapterError, match="metadata"):
        lorakit.convert(file, tmp_path / "out", "peft")


class Calls:
    """A pickle that would create a file if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_code_of_a_pickle_is_run(tmp_path: Path) -> None:
    torch.save({"a.lora_A": Calls(tmp_path / "ran")}, tmp_path / "l.pt")
    with pytest.raises(AdapterError, match="lorakit does not run code from files") as caught:
        lorakit.convert(tmp_path / "l.pt", tmp_path / "out", "peft")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_cut_short(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"l.{suffix}"
    (torch.save if suffix == "pt" else save_file)(stored(a__lora_A=(64, 64)), file)
    whole = file.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            AdapterError, match=r"l\.\w+: (corrupt or truncated|contains more)"
        ) as caught:
            lorakit.convert(file, tmp_path / "out", "peft")
        assert "\n" not in str(caught.value)
