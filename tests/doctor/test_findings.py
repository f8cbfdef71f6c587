from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.doctor.diagnose import Diagnosis, diagnose
from lorakit.doctor.finding import Finding
from lorakit.doctor.gpu import gpu_findings
from lorakit.doctor.host import host_findings, start_sample
from lorakit.doctor.hub import Request, hub_findings
from lorakit.doctor.kernels import kernel_findings
from lorakit.doctor.storage import storage_findings
from lorakit.doctor.versions import version_findings


def named(findings: Iterator[Finding] | list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine_can_train() -> None:
    found = diagnose()
    assert found.status != "error"
    names = named([*found.findings])
    assert names["torch"].value == torch.__version__
    assert names["python"].text == ".".join(map(str, sys.version_info[:3]))
    assert {finding.area for finding in found.findings} == {
        "versions", "gpu", "kernels", "host", "storage", "hub",
    }  # fmt: skip
    assert all(f.hint for f in found.findings if f.status != "ok")


def test_the_status_is_the_worst() -> None:
    good = Finding("a", "b", 1, "1")
    bad = Finding("a", "c", 1, "1", "error", "mend it")
    assert Diagnosis((good,)).status == "ok"
    found = Diagnosis((bad, good, Finding("a", "d", 1, "1", "warning")))
    assert (found.status, found.count("error"), found.count("warning")) == ("error", 1, 1)


def test_a_torch_that_cannot_be_imported_is_an_error() -> None:
    found = named(version_findings(None, "libcudart.so.12: cannot open shared object file"))
    assert found["import torch"].status == "error"
    assert "libcudart" in found["import torch"].text


@pytest.mark.parametrize(
    ("installed", "hint"),
    [
        ("4.40.0", 'pip install "transformers>=5.10,<6"'),
        (None, 'pip install "transformers>=5.10,<6"'),
    ],
)
def test_a_package_that_does_not_fit_is_an_error(
    installed: str | None, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata as metadata

    real = metadata.version

    def version(name: str) -> str:
        if name != "transformers":
            return real(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(
        metadata, "requires", lambda _: ["transformers>=5.10,<6", "x>=1; extra == 'y'"]
    )
    found = named(version_findings(torch, None))
    assert (found["transformers"].status, found["transformers"].hint) == ("error", hint)
    assert "x" not in found


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    found = named(kernel_findings(torch))["C++ compiler"]
    assert (found.status, found.value) == ("ok" if torch.cuda.is_available() else "warning", None)
    compiler = tmp_path / "my-c++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-c++")
    assert named(kernel_findings(torch))["C++ compiler"].value == str(compiler)


def fake_torch(**cuda: Any) -> Any:
    """A torch with one GPU, which this machine may not have."""
    known = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda _index: "NVIDIA T4",
        "get_device_capability": lambda _index=0: (7, 5),
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90"],
        "mem_get_info": lambda _index: (12 << 30, 16 << 30),
    }
    return SimpleNamespace(
        cuda=SimpleNamespace(**{**known, **cuda}), version=torch.version, cpu=torch.cpu
    )


def test_a_gpu() -> None:
    found = named(gpu_findings(fake_torch()))
    assert found["cuda:0"].text == "NVIDIA T4, compute capability 7.5"
    assert found["cuda:0 memory"].value == {"free_bytes": 12 << 30, "total_bytes": 16 << 30}
    assert found["mig"].value is False
    assert all(finding.status == "ok" for finding in found.values())


def test_a_gpu_that_others_use() -> None:
    found = named(gpu_findings(fake_torch(mem_get_info=lambda _index: (1 << 30, 16 << 30))))
    assert found["cuda:0 memory"].status == "warning"
    assert found["cuda:0 memory"].text == "1.0 GiB free of 16.0 GiB"


def test_a_gpu_that_torch_is_too_old_for() -> None:
    found = named(gpu_findings(fake_torch(get_device_capability=lambda _index=0: (12, 0))))
    assert found["cuda:0 kernels"].status == "error"


def test_a_partition_of_a_gpu() -> None:
    name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    assert named(gpu_findings(fake_torch(get_device_name=lambda _index: name)))["mig"].value is True


@pytest.mark.parametrize(
    ("capability", "bf16", "fp8"),
    [((7, 5), False, False), ((8, 0), True, False), ((9, 0), True, True)],
)
def test_number_formats_of_gpus(capability: tuple[int, int], bf16: bool, fp8: bool) -> None:
    found = named(kernel_findings(fake_torch(get_device_capability=lambda _index=0: capability)))
    assert (found["bf16"].value, found["fp8"].value) == (bf16, fp8)


def test_limits_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{3 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{2 << 30}\n")
    found = named(host_findings(SimpleNamespace(get_num_threads=lambda: 4), None, tmp_path))
    assert found["cores"].value == 0.5
    assert (found["threads"].status, found["threads"].hint) == (
        "warning",
        "export OMP_NUM_THREADS=1",
    )
    assert found["memory"].value == {"total_bytes": 3 << 30, "available_bytes": 1 << 30}
    assert found["memory"].status == "warning"


def test_limits_of_an_older_container(tmp_path: Path) -> None:
    for name, value in (("cpu/cpu.cfs_quota_us", "20000"), ("cpu/cpu.cfs_period_us", "100000"),
                        ("memory/memory.limit_in_bytes", str(8 << 20))):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(value)
    found = named(host_findings(None, None, tmp_path))
    assert found["cores"].value == 0.2
    assert found["memory"].value == {"total_bytes": 8 << 20, "available_bytes": 8 << 20}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's statistics")
def test_contention_is_measured() -> None:
    start = start_sample()
    time.sleep(0.3)
    found = named(host_findings(None, start))["contention"]
    assert isinstance(found.value, dict)
    assert 0 <= found.value["cores_of_others"] <= (os.cpu_count() or 1) + 1


def test_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "inductor"
    cache.mkdir()
    (cache / "kernel").write_bytes(b"x" * 3000)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    found = named(storage_findings(0))
    value: Any = found["lorakit cache"].value
    assert value["path"] == str(tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()
    assert found["compiler cache"].value == {
        "path": str(cache),
        "size_bytes": 3000,
        "writable": True,
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    found = named(storage_findings(0))["lorakit cache"]
    assert (found.status, found.hint) == ("warning", "export LORAKIT_CACHE=DIRECTORY")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_answers(endpoint: str) -> None:
    assert named(hub_findings(Request(endpoint)))["access"].value is True


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        found = named(hub_findings(Request(f"http://127.0.0.1:{unused.getsockname()[1]}")))
    assert (found["access"].status, found["access"].value) == ("warning", False)


def test_the_token_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = named(hub_findings(None))
    assert found["token"].value is True
    assert "hf_secret" not in repr(found)


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[float, float, float]:
        raise OSError("no such file")

    monkeypatch.setattr(os, "getloadavg", fail)
    found = named([*diagnose().findings])
    assert found["check"].text == "failed: OSError: no such file"
