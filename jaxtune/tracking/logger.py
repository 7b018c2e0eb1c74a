"""The logger `jaxtune`, by which a program that uses jaxtune decides where messages go."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("jaxtune")


def is_configured() -> bool:
    """Return whether the program has given the logger a handler or a level, or cut it off."""
    return bool(LOGGER.handlers) or LOGGER.level != logging.NOTSET or not LOGGER.propagate


class StderrHandler(logging.Handler):
    """Prints each message alone on what is stderr at that moment, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # as every handler of the standard library
            self.handleError(record)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print messages on stderr, as the command line does, unless the logger is configured."""
    if is_configured():
        yield
        return
    handler = StderrHandler()
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.propagate = True
