"""Accelerate reads every file in configs/ and knows every key in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from lorakit.distributed.launcher import check_fsdp_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: file -> (distributed_type, machines, processes)
EXPECTED = {
    "one_gpu.yaml": ("NO", 1, 1),
    "ddp.yaml": ("MULTI_GPU", 1, 8),
    "fsdp2.yaml": ("FSDP", 1, 8),
    "two_nodes.yaml": ("MULTI_GPU", 2, 16),
}


def test_every_config_is_expected_here() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_loads_it(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / name))
    assert isinstance(config, ClusterConfig)
    kind, machines, processes = EXPECTED[name]
    assert config.distributed_type.value == kind
    assert (config.num_machines, config.num_processes) == (machines, processes)
    # The arithmetic is the recipe's to choose: autocast on top of it would change the results.
    assert config.mixed_precision == "no"


@pytest.mark.parametrize("name", EXPECTED)
def test_every_nested_key_is_an_option_of_the_launcher(name: str) -> None:
    """Accelerate refuses unknown keys only at the top level; nested ones would be ignored."""
    options = {action.dest for action in launch_command_parser()._actions}
    data = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    nested = {key for part in data.values() if isinstance(part, dict) for key in part}
    assert nested <= options


def test_fsdp2_is_version_2() -> None:
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml"))
    assert config.fsdp_config["fsdp_version"] == 2


def test_the_settings_of_fsdp2_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config.items():
        monkeypatch.setenv(key.upper(), str(value).lower())
    check_fsdp_settings()
