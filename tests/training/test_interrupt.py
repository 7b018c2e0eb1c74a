"""Signals that ask a run to stop."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from jaxtune.training.interrupt import StopRequest, StopRequested
from tests.support import tools


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_terminal_that_is_closed_may_say_so_twice():
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signalled() == signal.SIGHUP
        with pytest.raises(StopRequested):
            stop.check()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    stop.check()  # outside, an evaluation is not stopped


def test_under_nohup_a_closed_terminal_does_not_stop_the_run():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signalled() is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_what_is_printed_after_the_terminal_is_gone_does_not_end_the_run(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from jaxtune.training.interrupt import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while stop.signalled() is None: time.sleep(0.01)\n"
        "    print('saving', file=sys.stderr, flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
    )
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
        env=tools.child_environment(),
    )  # fmt: skip
    os.close(terminal)
    assert b"ready" in os.read(controller, 100)
    os.close(controller)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "saved").exists()
