from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import ClassVar

import pytest

import lorakit
from lorakit.errors import Interrupted
from lorakit.training.control import announcing_stops, stop_request
from lorakit.training.tracking import Display
from tests.training.runs import recipe_for


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_requests_a_stop_and_the_second_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_request() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop
        assert stop.signal_number == number
        with pytest.raises(Interrupted) as stopped:
            signal.raise_signal(number)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_that_the_launcher_repeats_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stop_request() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


def test_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), stop_request():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_trains_without_handlers() -> None:
    seen = []

    def work() -> None:
        with stop_request() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_display_announces_the_stop(capfd: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    with stop_request(), announcing_stops(shown.append):
        signal.raise_signal(signal.SIGTERM)
    assert shown == ["received SIGTERM: stopping after saving a checkpoint"]
    assert capfd.readouterr().err == ""
    with stop_request():
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == f"{shown[0]}\n"


class Phases(Display):
    """Notes what is measured, once for each evaluation."""

    seen: ClassVar[list[str]] = []

    def evaluating(self, what: str, done: int, total: int) -> None:
        if done == total:
            self.seen.append(what)


def test_the_final_evaluation_measures_only_what_is_new(tiny_llama: Path, tmp_path: Path) -> None:
    """The weights are those of the best evaluation, whose loss is known."""
    recipe = recipe_for(tmp_path, tiny_llama, "completion", task__eval_generate="end")
    Phases.seen.clear()
    run = lorakit.train(recipe, display=Phases)
    assert Phases.seen == ["loss", "loss", "generated"]
    measured = lorakit.evaluate(recipe, adapter=run.adapter_dir)
    assert run.metrics == pytest.approx(measured)
