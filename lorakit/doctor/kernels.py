"""What computes: Triton and its C compiler, number formats, attention, bitsandbytes, and the C++
compiler of torch.compile on the CPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.doctor.finding import Finding
from lorakit.doctor.versions import installed_version

_AREA = "kernels"
_INSTALL = "apt-get install {}   # or your system's package manager"


def kernel_findings(torch: Any) -> Iterator[Finding]:
    """The kernels that torch and lorakit can use on this machine."""
    has_cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if has_cuda else None
    yield _triton(has_cuda)
    if has_cuda:
        yield _c_compiler()
    yield _cpp_compiler(has_cuda)
    yield _bf16(torch, capability)
    yield _fp8(capability)
    yield _bitsandbytes(torch)
    yield _attention(capability)


def _found(name: str, value: object, text: str) -> Finding:
    return Finding(_AREA, name, value, text)


def _triton(has_cuda: bool) -> Finding:
    version = installed_version("triton")
    if version is not None:
        return _found("triton", version, version)
    if not has_cuda:
        return _found("triton", None, "not installed, and not needed on the CPU")
    text = "not installed: train.kernels: auto and compiled layers are not available"
    return Finding(_AREA, "triton", None, text, "warning", "pip install triton")


def _c_compiler() -> Finding:
    """Triton compiles a launcher in C for each kernel, against Python's headers."""
    compiler = _first_program(os.environ.get("CC"), "gcc", "clang", "cc")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    if compiler is None:
        text = "none: Triton cannot launch kernels"
        return Finding(_AREA, "C compiler", None, text, "warning", _INSTALL.format("gcc"))
    if not headers:
        text = f"{compiler}, without Python's headers: Triton cannot launch kernels"
        hint = _INSTALL.format(f"python{sys.version_info[0]}.{sys.version_info[1]}-dev")
        return Finding(_AREA, "C compiler", compiler, text, "warning", hint)
    return _found("C compiler", compiler, compiler)


def _cpp_compiler(has_cuda: bool) -> Finding:
    compiler = _first_program(os.environ.get("CXX"), "g++", "clang++", "c++")
    if compiler is not None:
        return _found("C++ compiler", compiler, compiler)
    text = "none: train.compile: true does not work on the CPU"
    if has_cuda:
        return _found("C++ compiler", None, text)
    return Finding(_AREA, "C++ compiler", None, text, "warning", _INSTALL.format("g++"))


def _first_program(*names: str | None) -> str | None:
    found = (shutil.which(name) for name in names if name)
    return next((path for path in found if path), None)


def _bf16(torch: Any, capability: tuple[int, int] | None) -> Finding:
    if capability is not None:
        if capability >= (8, 0):
            return _found("bf16", True, "yes")
        text = "emulated on this GPU"
        return Finding(_AREA, "bf16", False, text, "warning", "model.dtype: float16, or float32")
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    native = bool(supported())
    return _found("bf16", native, "yes" if native else "computed in float32 on this CPU")


def _fp8(capability: tuple[int, int] | None) -> Finding:
    usable = capability is not None and capability >= (8, 9)
    needs = "no: model.base_precision: fp8 needs compute capability 8.9"
    return _found("fp8", usable, "yes" if usable else needs)


def _bitsandbytes(torch: Any) -> Finding:
    """Whether the library of bitsandbytes for this build of torch can be loaded; importing the
    package itself takes seconds."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        text = "not installed: model.base_precision: nf4 and train.optimizer: adamw_8bit need it"
        return _found("bitsandbytes", None, f"{text} (pip install bitsandbytes)")
    folder = Path(next(iter(spec.submodule_search_locations)))
    cuda = (torch.version.cuda or "").replace(".", "") if torch.cuda.is_available() else ""
    name = f"libbitsandbytes_cuda{cuda}" if cuda else "libbitsandbytes_cpu"
    library = next((folder / f"{name}{end}" for end in (".so", ".dylib", ".dll")
                    if (folder / f"{name}{end}").is_file()), None)  # fmt: skip
    if library is None:
        problem = f"has no {name}"
    else:
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            problem = f"cannot load {library.name}: {error}"
        else:
            version = importlib.metadata.version("bitsandbytes")
            return _found("bitsandbytes", version, f"{version}, usable")
    hint = "pip install --upgrade bitsandbytes"
    return Finding(_AREA, "bitsandbytes", False, problem, "warning", hint)


def _attention(capability: tuple[int, int] | None) -> Finding:
    backends = ["math"]
    if capability is not None:
        backends += ["efficient"] + (["flash", "cudnn"] if capability >= (8, 0) else [])
    else:
        backends.append("flash (CPU)")
    if importlib.util.find_spec("flash_attn") is not None:
        backends.append("flash-attn package")
    return _found("attention", backends, ", ".join(backends))
