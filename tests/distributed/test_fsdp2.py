from __future__ import annotations

import pytest

from lorakit.distributed.fsdp2 import kept_layers


@pytest.mark.parametrize(
    ("sizes", "room_bytes", "kept"),
    [([3, 3, 3], 7, 2), ([3, 3, 3], 9, 3), ([9, 1, 2], 4, 2), ([3, 3, 3], 0, 1), ([3, 8], 4, 1)],
)
def test_the_last_layers_that_fit_stay_gathered(
    sizes: list[int], room_bytes: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    assert kept_layers(sizes, room_bytes) == kept


def test_the_launcher_may_keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert kept_layers([3, 3, 3], 0) == 3
