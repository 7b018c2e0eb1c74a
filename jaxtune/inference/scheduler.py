"""The rows of a cache that answers share, and who has them."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxtune.core.distributed import fetch
from jaxtune.inference import programs
from jaxtune.inference.prefill import Prefiller, Prefix, Prompt, bucket
from jaxtune.inference.programs import Chosen, DecodeState, Prefilled
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.speed import seconds


class Piece(NamedTuple):
    """New tokens of an answer.

    Attributes:
        number: of the prompt.
        tokens: the new ones.
        log_probs: their log-probabilities under the model, in nats.
        end: why the answer has ended: `stop` (a stop token, which is not part of it), `length`, or
            `watch`; None while it goes on.

    """

    number: int
    tokens: list[int]
    log_probs: list[float]
    end: str | None


@dataclass
class Answer:
    """An answer's tokens, their log-probabilities and why it ended; see `Piece`."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    end: str | None = None


@dataclass(eq=False)
class Request:
    """An answer under way.

    Attributes:
        number: of the prompt.
        prompt: its ids.
        most: how many tokens the answer may have.
        answer: what is written.
        left: how many tokens may still be written behind what was read.

    """

    number: int
    prompt: Prompt
    most: int
    answer: Answer = field(default_factory=Answer)
    left: int = 0

    @property
    def context(self) -> list[int]:
        """What is to be read."""
        return [*self.prompt, *self.answer.tokens]

    def read(self, limit: int | None) -> None:
        """Its context is read. A text that grows past `limit`, the model's `rope_limit`, is read
        anew there, as a long one.
        """
        missing, length = self.most - len(self.answer.tokens), len(self.context)
        self.left = missing if limit is None or length > limit else min(missing, limit + 1 - length)

    def add(self, tokens: list[int], log_probs: list[float]) -> None:
        """More of the answer."""
        self.answer.tokens += tokens
        self.answer.log_probs += log_probs
        self.left -= len(tokens)

    @property
    def full(self) -> bool:
        """Whether the answer has as many tokens as it may have."""
        return len(self.answer.tokens) >= self.most


News = Iterator[tuple[Request, list[int], list[float], bool]]
"""Of every answer under way its new tokens, their log-probabilities, and whether it goes on."""


class Scheduler:
    """The rows of one call.

    Args:
        reader: the model.
        stop_ids: tokens that end an answer.
        sampling: how tokens are chosen.
        most: rows that are computed together at most.
        size: positions of a row.
        prefix: what all prompts begin with.

    """

    def __init__(
        self,
        reader: Prefiller,
        stop_ids: tuple[int, ...],
        sampling: Sampling,
        most: int,
        size: int,
        prefix: Prefix | None,
    ) -> None:
        self._reader, self._stop_ids, self._sampling = reader, stop_ids, sampling
        self._most, self._size, self._prefix = most, size, prefix
        self._slots: DecodeState | None = None
        self.taken: dict[int, Request] = {}
        self._ended: set[int] = set()

    @property
    def rows(self) -> int:
        """How many answers are computed together."""
        return self._most if self._slots is None else len(self._slots.token)

    @property
    def free(self) -> int:
        """Scheduler that nobody has."""
        return self.rows - len(self.taken)

    @property
    def enough(self) -> int:
        """From so many free rows on it pays to read the next prompts."""
        return max(1, self.rows // 4)

    def leave(self, request: Request) -> None:
        """Its row is free."""
        for row in [row for row, other in self.taken.items() if other is request]:
            del self.taken[row]
            self._ended.add(row)

    def admit(self, queue: deque[Request]) -> News:
        """Read the next prompts into free rows."""
        requests = [queue.popleft() for _ in range(min(self.free, len(queue)))]
        rows = min(bucket(len(requests), 1), self.rows)
        contexts = [request.context for request in requests]
        return self.begin(requests, self._reader.read(contexts, self._size, self._prefix, rows))

    def begin(self, requests: list[Request], read: Prefilled) -> News:
        """The first tokens of answers whose prompts were read."""
        rows, sampling, config = len(read.lengths), self._sampling, self._reader.config
        numbers, who, left = (np.zeros(rows, np.int32) for _ in range(3))
        seen = np.zeros((rows, config.vocab_size if sampling.remembers else 0), bool)
        for row, request in enumerate(requests):
            who[row], numbers[row] = request.number, len(request.answer.tokens)
            request.read(config.rope_limit)
            left[row] = request.left
            if sampling.remembers:
                seen[row, request.context] = True
        new, chosen = programs.begin(sampling, self._stop_ids, *read, numbers, who, left, seen)
        if self._slots is None:
            self._slots, places = new, list(range(len(requests)))
        else:
            places = [row for row in range(self.rows) if row not in self.taken][: len(requests)]
            beyond = [self.rows] * (rows - len(places))
            self._slots = programs.put(self._slots, new, np.asarray([*places, *beyond], np.int32))
        self._ended -= set(places)
        self.taken |= dict(zip(places, requests, strict=True))
        return self._told(fetch(chosen), list(enumerate(requests)))

    def decode(self, steps: int, *, waiting: bool) -> News:
        """Go on with all answers, until enough rows are free for those who wait."""
        assert self._slots is not None
        ended = np.zeros(self.rows, bool)
        ended[list(self._ended)] = True
        least = self.rows - self.enough if waiting else 0
        model = self._reader
        with seconds() as taken:
            self._slots, chosen = programs.decode(
                model.graph,
                self._stop_ids,
                self._sampling,
                model.state,
                self._slots,
                ended,
                np.int32(steps),
                np.int32(least),
            )
            found = fetch(chosen)
        model.speed.new_tokens += int(found.made.sum())
        model.speed.decode_seconds += taken[0]
        return self._told(found, list(self.taken.items()))

    def _told(self, chosen: Chosen, who: list[tuple[int, Request]]) -> News:
        for row, request in who:
            made = int(chosen.made[row])
            yield (
                request,
                chosen.tokens[row, :made].tolist(),
                chosen.log_probs[row, :made].tolist(),
                bool(chosen.going[row]),
            )
