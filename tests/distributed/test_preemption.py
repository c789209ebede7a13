import os
import signal
import threading

import psutil
import pytest

from moa_dist.distributed import preemption as module
from moa_dist.distributed.launcher_watch import any_gone, launchers, watch_launchers
from moa_dist.distributed.preemption import PREEMPTION_SIGNALS, Preemption, signals_blocked

WAIT_S = 20


@pytest.fixture(autouse=True)
def _handlers():
    """Restore what a requested preemption leaves behind for the end of its process."""
    before = {number: signal.getsignal(number) for number in PREEMPTION_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_signals_are_recorded(number):
    with Preemption() as preemption:
        assert not preemption.requested
        signal.raise_signal(number)
        assert preemption.requested


def test_ctrl_c_that_the_launcher_forwards_counts_once():
    with Preemption(second_interrupt=signal.default_int_handler) as preemption:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested


def test_second_ctrl_c_interrupts(monkeypatch):
    monkeypatch.setattr(module, "SAME_INTERRUPT_S", 0.0)
    with Preemption(second_interrupt=signal.default_int_handler):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_notice_is_printed_once(capfd):
    with Preemption(notice="stopping"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "\nstopping\n"


def test_handlers_are_restored_unless_the_process_is_about_to_end():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with Preemption():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


def test_blocked_signals_include_ctrl_c():
    with signals_blocked():
        assert set(PREEMPTION_SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_only_launchers_are_watched():
    assert launchers({"RANK": "0", "WORLD_SIZE": "1"}) == []
    assert launchers({"TORCHELASTIC_RUN_ID": "none"}) == [os.getppid()]


def test_a_launcher_is_gone_when_its_child_has_another_parent():
    parent, *above = [process.pid for process in psutil.Process().parents()]
    assert not any_gone([parent, *above[:1]])
    assert any_gone([parent, 0])
    assert any_gone([0])


def test_watching_reports_a_launcher_that_is_gone():
    called = threading.Event()
    with watch_launchers([os.getppid()], called.set):
        assert not called.wait(1.0)
    with watch_launchers([os.getppid(), 0], called.set):
        assert called.wait(WAIT_S)
