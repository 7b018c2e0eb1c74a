#!/usr/bin/env python
"""The tests that make sense on one GPU, on this machine's device; arguments go to pytest. A test
that needs more devices than there are, or a package that is not here, is skipped and named.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import findings  # noqa: E402 (the path above)

MARK = "pytest.mark.gpu"


class Recorder:
    """A row for each test as it ends."""

    def pytest_collectreport(self, report):
        if report.failed:
            findings.add(report.nodeid, ok=False, said=str(report.longrepr)[-500:])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            findings.add(report.nodeid, ok=False, said=str(report.longrepr)[-500:])
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "?"
            findings.add(report.nodeid, skipped=reason.removeprefix("Skipped: "))
        elif report.when == "call":
            findings.add(report.nodeid, ok=True, seconds=round(report.duration, 1))


def main():
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    os.chdir(ROOT)
    # Other files may import what is not here.
    files = [str(path) for path in Path("tests").rglob("test_*.py") if MARK in path.read_text()]
    given = [] if any(argument.startswith("tests/") for argument in sys.argv[1:]) else files
    options = ["-m", "gpu and not slow", "-p", "no:cacheprovider", *sys.argv[1:], *given]
    code = pytest.main(options, plugins=[Recorder()])
    return int(code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))


if __name__ == "__main__":
    sys.exit(main())
