"""Signals end a command at once; in training the first one is recorded, the second does so."""

import os
import signal
import threading

import pytest
from dilated_models.training.stopping import StoppedAtOnce, StopSignals, stopping_at_once

NUMBERS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_is_answered_and_the_second_raises(capfd, number):
    before = signal.getsignal(number)

    def body() -> None:
        with StopSignals() as signals:
            signal.raise_signal(number)
            assert signals.received == number
            assert capfd.readouterr().err.splitlines()[-1] == (
                "dilated: stopping after this step; again to stop now"
            )
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # a third one does not disturb the clean-up

    with pytest.raises(StoppedAtOnce, match=number.name) as stopped:
        body()
    assert stopped.value.exit_code == 128 + number
    assert isinstance(stopped.value, KeyboardInterrupt)  # `except Exception` does not hold it up
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_nothing_is_recorded():
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def body() -> None:
        with StopSignals() as signals:
            seen.append(signals.received)
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None, before]


def test_without_training_the_first_signal_stops(monkeypatch):
    """Once in a second; a later one counts, because a finaliser may have dropped the first."""
    before, now = signal.getsignal(signal.SIGTERM), [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with stopping_at_once():
        with pytest.raises(StoppedAtOnce, match="stopped at once by SIGTERM") as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        now[0] += 2
        with pytest.raises(StoppedAtOnce, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGHUP")
def test_nohup_lets_a_command_outlive_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_at_once(), StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
