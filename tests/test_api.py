"""The public names, and the cost of importing them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lorakit
from lorakit import api

REPO = Path(__file__).resolve().parents[1]
LIGHT = ("lorakit.api", "lorakit.pipeline.task_data", "lorakit.pipeline.predictions")


@pytest.mark.parametrize("module", [lorakit, api], ids=lambda module: module.__name__)
def test_every_public_name_is_there(module: ModuleType) -> None:
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'lorakit\.api' has no attribute 'trian'"):
        api.trian  # noqa: B018


def test_importing_the_calls_loads_no_tensor_library() -> None:
    code = (
        f"import {', '.join(LIGHT)}; import json, sys; "
        "print(json.dumps([name for name in ('numpy', 'torch', 'transformers') "
        "if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert json.loads(done.stdout) == []
