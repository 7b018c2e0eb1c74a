"""Messages and progress: what is printed where nothing is configured, and where a logger is."""

import io
import logging

import pytest
from rich.console import Console

from jaxtune.tracking.logger import LOGGER, StderrHandler, is_configured, log_to_stderr
from jaxtune.tracking.progress import Reporter


def speak(reporter):
    """Everything that a reporter can say."""
    reporter.say("100% of [data] :cat: %s\nin two lines")
    reporter.warn("WARNING: something is odd")
    with reporter.task("Training", 40) as task:
        for step in range(1, 41):
            task.update(step, "loss 1.0")
    with reporter.task("Tokenizing", 100, lazy=True) as task:
        task.update_share(0.5, "half")


@pytest.fixture
def records():
    """What reaches a handler of the program's own on the logger."""
    received = []

    class Keep(logging.Handler):
        def emit(self, record):
            received.append((record.levelname, record.getMessage()))

    handler = Keep()
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield received
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(logging.NOTSET)


def test_the_command_line_prints_what_the_library_prints(capsys):
    speak(Reporter())
    library = capsys.readouterr()
    with log_to_stderr():
        assert is_configured()
        speak(Reporter())
    command = capsys.readouterr()
    assert not is_configured()
    assert library.out == command.out == ""
    assert library.err == command.err
    lines = library.err.splitlines()
    assert lines[:3] == ["100% of [data] :cat: %s", "in two lines", "WARNING: something is odd"]
    assert lines[3] == "Training 1/40  loss 1.0  0:00 left"
    assert len([line for line in lines if line.startswith("Training")]) == 21


def test_a_configured_logger_gets_all_and_the_screen_nothing(records, capsys):
    speak(Reporter())
    assert capsys.readouterr().err == ""
    assert records[0] == ("INFO", "100% of [data] :cat: %s\nin two lines")
    assert records[1] == ("WARNING", "WARNING: something is odd")
    assert records[2] == ("INFO", "Training 1/40  loss 1.0  0:00 left")
    with log_to_stderr():  # a program that configured the logger keeps what it configured
        Reporter().say("more")
    assert capsys.readouterr().err == ""
    assert records[-1] == ("INFO", "more")
    LOGGER.setLevel(logging.WARNING)
    Reporter().say("not wanted")
    assert records[-1] == ("INFO", "more")


def test_quiet_is_quiet_with_and_without_a_logger(records, capsys):
    speak(Reporter(quiet=True))
    assert records == []
    LOGGER.handlers.clear()
    LOGGER.setLevel(logging.NOTSET)
    speak(Reporter(quiet=True))
    assert capsys.readouterr().err == ""


def test_in_a_terminal_a_bar_is_drawn_and_messages_still_go_to_the_logger(records):
    reporter = Reporter()
    screen = io.StringIO()
    reporter.console = Console(file=screen, force_terminal=True, width=100)
    speak(reporter)
    assert "40/40" in screen.getvalue()
    assert [message for _, message in records] == [
        "100% of [data] :cat: %s\nin two lines",
        "WARNING: something is odd",
    ]


def test_messages_stand_above_a_bar_that_is_drawn(capsys):
    """A bar replaces stderr while it lives, so the handler must ask for it anew each time."""
    handler, first, second = StderrHandler(), io.StringIO(), io.StringIO()
    for stream in (first, second):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            handler.handle(logging.makeLogRecord({"msg": "hello"}))
    assert first.getvalue() == second.getvalue() == "hello\n"
