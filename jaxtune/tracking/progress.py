"""What a person sees of a run: a bar in a terminal, a line per report elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from jaxtune.core.distributed import is_main
from jaxtune.core.text import visible, without_credentials
from jaxtune.tracking.logger import LOGGER, is_configured

REPORTS = 20


class Reporter:
    """Messages and progress on stderr, so that stdout carries results alone.

    Where the program has configured the logger `jaxtune`, messages go there instead, and so do the
    lines of progress where no bar is drawn. Of several processes only the main one speaks.

    Args:
        quiet: say nothing but errors.

    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(
            stderr=True, quiet=quiet or not is_main(), highlight=False, soft_wrap=True, emoji=False
        )

    def say(self, text: str) -> None:
        """Say one line, or several."""
        _emit(self.console, text)

    def warn(self, text: str) -> None:
        """Say what went wrong without ending the run."""
        _emit(self.console, text, logging.WARNING)

    @contextmanager
    def task(
        self, name: str, total: int, start: int = 0, *, lazy: bool = False
    ) -> Iterator["Task"]:
        """Show progress over `total` units, of which `start` were done before.

        A lazy task shows nothing before its first update.
        """
        task = Task(self.console, name, total, start, lazy)
        with task:
            yield task


class Task:
    """One bar, or about twenty lines where there is no terminal."""

    def __init__(
        self, console: Console, name: str, total: int, start: int, lazy: bool = False
    ) -> None:
        self.console, self.name, self.lazy = console, name, lazy
        self.total, self.start = total, start
        self.bar: Progress | None = None
        self._began = time.monotonic()
        self._reported: int | None = None
        self._percent = -1

    def __enter__(self) -> "Task":
        if not self.lazy:
            self._show()
        return self

    def _show(self) -> None:
        if self.console.is_terminal and not self.console.quiet and self.bar is None:
            self.bar = Progress(*_columns(), console=self.console, expand=True)
            self.bar.start()
            self._id = self.bar.add_task(self.name, total=self.total, completed=self.start, text="")

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, text: str = "") -> None:
        """Show that this many units are done; `text` says more of them."""
        if self.bar:
            self.bar.update(self._id, completed=done, text=text)
            return
        every = max(1, -(-self.total // REPORTS))
        if self._reported is None or done - self._reported >= every or done == self.total:
            self._reported = done - done % every
            elapsed = time.monotonic() - self._began
            left = _clock(elapsed / max(done - self.start, 1) * (self.total - done))
            said = f"{text}  " if text else ""
            _emit(self.console, f"{self.name} {done}/{self.total}  {said}{left} left")

    def update_of(self, done: int, total: int) -> None:
        """Show that this many units of `total` are done, which was not known at the start."""
        self.total = total
        if self.bar:
            self.bar.update(self._id, total=total)
        self.update(done)

    def update_share(self, share: float, text: str) -> None:
        """Show that this share is done of a task whose units are hundredths."""
        percent = int(share * self.total)
        self._show()
        if self.bar or percent != self._percent:
            self._percent = percent
            self.update(percent, text)


def training_text(row: dict[str, Any]) -> str:
    """Return a training row in a few words."""
    return (
        f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.2f}  "
        f"{row['tokens_per_second']:,.0f} tok/s"
    )


def _emit(console: Console, text: str, level: int = logging.INFO) -> None:
    if console.quiet:
        return
    text = visible(without_credentials(text))
    if is_configured():
        LOGGER.log(level, "%s", text)
    else:
        console.print(text, markup=False)


def _columns() -> tuple[ProgressColumn, ...]:
    """Return a bar's columns: in a narrow terminal the text at the end gives way, never the time
    that is left.
    """
    whole, rest = Column(no_wrap=True), Column(no_wrap=True, ratio=1, overflow="ellipsis")
    return (
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=10, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=whole),
        TextColumn("{task.fields[text]}", table_column=rest),
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
