"""Parts of a check: processes with a limit of time and of memory each. A part that raises, hangs or
eats memory loses nothing of the others, and what it had found until then is kept.

Only the standard library: a bare machine runs this file before anything is installed.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

POLL = 0.25  # seconds between two looks at what runs
PAGE = os.sysconf("SC_PAGE_SIZE")
TAIL = 20_000  # bytes of a part's output that are kept

PASSED, FAILED, RAISED = "passed", "failed", "raised"
TIMED_OUT, ATE_MEMORY, NOT_REACHED = "timed out", "ate memory", "not reached"


@dataclass
class Part:
    """A process that appends rows of JSON to the file that ROWS names.

    A row has a `name` and what was found; `ok: false` says that it is wrong. An empty part, one
    that ends without a row, has raised.

    Attributes:
        name: what the table calls it.
        command: the program and its arguments.
        limit: seconds.
        memory: bytes that its processes may hold together, the GPU's not counted.
        timed: nothing else runs beside it.
        needed: the others are not begun unless it passed.
        environment: further variables.

    """

    name: str
    command: list[str]
    limit: float
    memory: int
    timed: bool = False
    needed: bool = False
    environment: dict[str, str] = field(default_factory=dict)


class Running:
    """A part's process."""

    def __init__(self, part, folder, limit):
        self.part, self.limit, self.began = part, limit, time.monotonic()
        stem = part.name.replace(" ", "-").replace("/", "-")
        self.rows_path, self.log_path = folder / f"{stem}.jsonl", folder / f"{stem}.log"
        self.rows_path.touch()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | part.environment | {"ROWS": str(self.rows_path)},
                start_new_session=True,
            )
        self.peak, self.state = 0, "running"

    @property
    def seconds(self):
        return time.monotonic() - self.began

    def ended(self):
        """Whether it has ended; ends it where it is over a limit."""
        family = descendants(self.process.pid)
        self.peak = max(self.peak, sum(family.values()))
        code = self.process.poll()
        if code is None and self.seconds < self.limit and self.peak < self.part.memory:
            return False
        if code is None:
            self.state = TIMED_OUT if self.peak < self.part.memory else ATE_MEMORY
        if code is not None:
            family.pop(self.process.pid, None)  # it is gone, its number may be another's
        end(family)
        self.process.wait()
        if code is not None:
            rows = self.rows()
            wrong = any(row.get("ok") is False for row in rows)
            self.state = RAISED if code or not rows else FAILED if wrong else PASSED
        return True

    def rows(self):
        """The rows so far; a last line that is only half there is none."""
        lines = self.rows_path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def record(self):
        tail = self.log_path.read_bytes()[-TAIL:].decode(errors="replace")
        return {
            "name": self.part.name,
            "state": self.state,
            "seconds": round(self.seconds, 1),
            "limit": round(self.limit, 1),
            "peak_memory": self.peak,
            "rows": self.rows(),
            "log": tail,
        }


def descendants(root):
    """`{process: bytes in memory}` of a process and of all that it started, by /proc; a process
    that left its parent is found by its session.
    """
    parents, sessions, sizes = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            number = int(entry.name)
            parents[number], sessions[number] = int(words[1]), int(words[3])
            sizes[number] = int((entry / "statm").read_text().split()[1]) * PAGE
        except (OSError, IndexError, ValueError):
            continue  # it has ended meanwhile
    chosen = {root} | {number for number, session in sessions.items() if session == root}
    while more := {n for n, parent in parents.items() if parent in chosen} - chosen:
        chosen |= more
    return {number: sizes[number] for number in chosen if number in sizes}


def end(family):
    for number in family:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run_all(parts, folder, *, total, jobs, least, changed):
    """Run the parts in their order, several untimed ones at once, and return a record of each.

    Args:
        parts: the parts.
        folder: for their rows and logs.
        total: seconds for all of them.
        jobs: how many run at once.
        least: a part is not begun with fewer seconds left than this.
        changed: is given all records, those of running parts too, whenever one begins or ends and
            every few seconds.

    """
    deadline, waiting, running, records = time.monotonic() + total, list(parts), [], {}
    told = 0.0

    def tell():
        shown = records | {one.part.name: one.record() for one in running}
        changed([shown[part.name] for part in parts if part.name in shown])

    try:
        while waiting or running:
            moved = False
            left = deadline - time.monotonic()
            while waiting and len(running) < jobs and may_begin(waiting[0], running):
                part = waiting.pop(0)
                moved = True
                if left < min(least, part.limit):
                    records[part.name] = not_reached(part)
                    continue
                running.append(Running(part, folder, min(part.limit, left)))
            for one in list(running):
                if one.ended():
                    running.remove(one)
                    records[one.part.name] = one.record()
                    if one.part.needed and one.state != PASSED:
                        records |= {part.name: not_reached(part) for part in waiting}
                        waiting.clear()
                    moved = True
            if moved or time.monotonic() - told > 5:
                told = time.monotonic()
                tell()
            time.sleep(POLL)
    finally:
        for one in running:
            end(descendants(one.process.pid))
    return [records[part.name] for part in parts]


def may_begin(part, running):
    """Whether a part may begin beside those that run."""
    return not running or not (part.timed or running[0].part.timed)


def not_reached(part):
    return {"name": part.name, "state": NOT_REACHED, "seconds": 0.0, "rows": [], "log": ""}
