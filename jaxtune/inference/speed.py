"""How fast a model reads and writes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax


@dataclass
class Speed:
    """Tokens and seconds of an engine so far, without compilation."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode(self) -> float:
        """New tokens a second, of all rows together."""
        return self.new_tokens / max(self.decode_seconds, 1e-9)


@contextmanager
def seconds() -> Iterator[list[float]]:
    """Measure how long the block takes, without compilation; the list has it once it is over."""
    elapsed, compiling = [0.0], [0.0]

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        compiling[0] += duration_secs if event.startswith("/jax/core/compile/") else 0.0

    jax.monitoring.register_event_duration_secs_listener(compiled)
    began = time.perf_counter()
    try:
        yield elapsed
    finally:
        elapsed[0] = max(time.perf_counter() - began - compiling[0], 0.0)
        jax.monitoring.unregister_event_duration_listener(compiled)
