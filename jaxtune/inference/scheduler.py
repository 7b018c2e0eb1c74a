"""The rows of a cache that answers share: who has one, who waits, and when the cache grows."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxtune.core.distributed import fetch
from jaxtune.core.errors import RunError
from jaxtune.inference import programs
from jaxtune.inference.prefill import Prefiller, Prefix, TokenIds, bucket
from jaxtune.inference.programs import DecodeLimits, DecodeState, NewTokens, Prefilled, Starts
from jaxtune.inference.sampling import Sampling, SamplingArrays
from jaxtune.inference.speed import seconds

STOPPED, LENGTH, WATCHED, CANCELLED = "stop", "length", "watch", "cancel"
"""Why an answer ended: a stop token, which is not part of it; its length; its watcher; a call."""

Watch = Callable[[int, list[int]], int | None]
"""Called with a request's number and its answer when that has grown; returns how many tokens to
keep, no fewer than there were before, where the answer ends."""


@dataclass
class Answer:
    """An answer's tokens, their log-probabilities in nats, and why it ended (None: it goes on)."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    end: str | None = None


class AnswerPiece(NamedTuple):
    """New tokens of an answer, their log-probabilities, and why it has ended, if it has."""

    tokens: list[int]
    log_probs: list[float]
    end: str | None


@dataclass(eq=False)
class Request:
    """A prompt with the answer that is being written.

    Attributes:
        prompt: its ids.
        max_new_tokens: how many tokens the answer may have.
        sampling: how its tokens are chosen.
        number: sets its draws apart from those of other requests with the same seed.
        prefix: the beginning that was read before.
        watch: see `Watch`.
        interval: the most tokens between two pieces.
        answer: what is written.
        pieces: what nobody has taken yet.
        left: how many tokens may still be written behind the text that was read.

    """

    prompt: TokenIds
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    number: int = 0
    prefix: Prefix | None = None
    watch: Watch | None = None
    interval: int = programs.MAX_STEPS
    answer: Answer = field(default_factory=Answer)
    pieces: deque[AnswerPiece] = field(default_factory=deque)
    left: int = 0

    @property
    def context(self) -> list[int]:
        """The tokens to be read."""
        return [*self.prompt, *self.answer.tokens]

    @property
    def positions(self) -> int:
        """Positions of the cache that it needs at most."""
        return len(self.prompt) + self.max_new_tokens

    def start(self, limit: int | None) -> None:
        """Count what may be written, now that the context is read.

        A text that grows past `limit`, the model's `rope_limit`, is read again there, as a long
        one.
        """
        self.left, length = self.max_new_tokens - len(self.answer.tokens), len(self.context)
        if limit is not None and length <= limit:
            self.left = min(self.left, limit + 1 - length)

    def add(self, tokens: list[int], log_probs: list[float]) -> None:
        """Append tokens to the answer."""
        self.answer.tokens += tokens
        self.answer.log_probs += log_probs
        self.left -= len(tokens)

    def drop_after(self, count: int) -> None:
        """Keep only the first tokens of the answer."""
        del self.answer.tokens[count:], self.answer.log_probs[count:]

    @property
    def full(self) -> bool:
        """Whether the answer has as many tokens as it may have."""
        return len(self.answer.tokens) >= self.max_new_tokens


class RowUpdate(NamedTuple):
    """What a program wrote of one answer, and whether that goes on."""

    request: Request
    tokens: list[int]
    log_probs: list[float]
    active: bool


class Scheduler:
    """The rows that answers share.

    Its arrays come with the first prompts, grow in few shapes with requests that need more, and go
    when there is nothing left to do.

    Args:
        prefiller: the model.
        stop_ids: tokens that end an answer.
        max_rows: the most rows that are computed together.

    """

    def __init__(self, prefiller: Prefiller, stop_ids: tuple[int, ...], max_rows: int) -> None:
        self._model, self._stop_ids, self._max_rows = prefiller, stop_ids, max_rows
        self._state: DecodeState | None = None
        self._ended: set[int] = set()
        self.active: dict[int, Request] = {}
        self.waiting: deque[Request] = deque()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.active and not self.waiting

    @property
    def rows(self) -> int:
        """How many answers are computed together."""
        return self._max_rows if self._state is None else len(self._state.token)

    @property
    def can_admit(self) -> bool:
        """Whether prompts wait, and enough rows are free that it pays to read them."""
        free = self.rows - len(self.active)
        could_grow = self.rows < self._max_rows
        return bool(self.waiting) and (could_grow or free >= self._enough)

    @property
    def _enough(self) -> int:
        return max(1, self.rows // 4)

    def leave(self, request: Request) -> None:
        """Free the row of a request, or take it out of the queue."""
        if request in self.waiting:
            self.waiting.remove(request)
        for row in [row for row, other in self.active.items() if other is request]:
            del self.active[row]
            self._ended.add(row)
        if self.idle:
            self._state, self._ended = None, set()

    def admit(self) -> Iterator[RowUpdate]:
        """Read the next waiting prompts into free rows; those that share a prefix go together."""
        self._make_room()
        free = self.rows - len(self.active)
        prefix = self.waiting[0].prefix
        requests: list[Request] = []
        while self.waiting and len(requests) < free and self.waiting[0].prefix is prefix:
            requests.append(self.waiting.popleft())
        rows = min(bucket(len(requests), 1), self.rows)
        contexts = [request.context for request in requests]
        return self.begin(
            requests, self._model.read(contexts, rows, self._positions(requests), prefix)
        )

    def _positions(self, requests: list[Request]) -> int:
        """Return the positions of the cache's rows, or what they are to be."""
        if self._state is not None:
            return self._state.cache.keys.shape[2]
        return bucket(max(request.positions for request in [*requests, *self.waiting]))

    def _make_room(self) -> None:
        """Grow the arrays for what waits, where it is more or longer than they hold."""
        state = self._state
        if state is None:
            return
        sizes = (len(state.token), state.cache.keys.shape[2], state.seen.shape[1])
        requests = len(self.active) + len(self.waiting)
        remembers = any(request.sampling.remembers for request in self.waiting)
        needed = (
            min(bucket(requests, 1), self._max_rows),
            bucket(max(request.positions for request in self.waiting)),
            self._model.config.vocab_size if remembers else 0,
        )
        grown = tuple(map(max, sizes, needed))
        if grown != sizes:
            self._state = programs.grow(state, *grown)

    def begin(self, requests: list[Request], prefilled: Prefilled) -> Iterator[RowUpdate]:
        """Choose the first tokens of answers whose prompts were read."""
        rows, config = len(prefilled.lengths), self._model.config
        draw, written, left = (np.zeros(rows, np.int32) for _ in range(3))
        remembers = any(request.sampling.remembers for request in requests)
        columns = self._state.seen.shape[1] if self._state is not None else 0
        seen = np.zeros((rows, config.vocab_size if remembers else columns), bool)
        for row, request in enumerate(requests):
            draw[row], written[row] = request.number, len(request.answer.tokens)
            request.start(config.rope_limit)
            left[row] = request.left
            if request.sampling.remembers:
                seen[row, request.context] = True
        sampling = SamplingArrays.of([request.sampling for request in requests], rows)
        starts = Starts(draw, written, left, seen, sampling)
        new, new_tokens = programs.begin(self._stop_ids, *prefilled, starts)
        if self._state is None:
            self._state, places = new, list(range(len(requests)))
        else:
            places = [row for row in range(self.rows) if row not in self.active][: len(requests)]
            beyond = [self.rows] * (rows - len(places))
            self._state = programs.insert(
                self._state, new, np.asarray([*places, *beyond], np.int32)
            )
        self._ended -= set(places)
        self.active |= dict(zip(places, requests, strict=True))
        return _row_updates(fetch(new_tokens), list(enumerate(requests)))

    def decode(self, steps: int) -> Iterator[RowUpdate]:
        """Continue all answers, until enough rows are free for the prompts that wait."""
        assert self._state is not None
        ended = np.zeros(self.rows, bool)
        ended[list(self._ended)] = True
        fewest = self.rows - self._enough if self.waiting else 0
        model = self._model
        with seconds() as elapsed:
            self._state, new_tokens = programs.decode(
                model.graph,
                self._stop_ids,
                model.weights,
                self._state,
                DecodeLimits(ended, np.int32(steps), np.int32(fewest)),
            )
            new_tokens = fetch(new_tokens)
        model.speed.new_tokens += int(new_tokens.num_tokens.sum())
        model.speed.decode_seconds += elapsed[0]
        return _row_updates(new_tokens, list(self.active.items()))


def _row_updates(new_tokens: NewTokens, requests: list[tuple[int, Request]]) -> Iterator[RowUpdate]:
    for row, request in requests:
        count, active = int(new_tokens.num_tokens[row]), bool(new_tokens.active[row])
        tokens, log_probs = new_tokens.tokens[row, :count], new_tokens.log_probs[row, :count]
        is_stopped = not active and count < request.left  # by a token that is not counted
        refuse_nan(np.asarray(new_tokens.log_probs[row, : count + is_stopped]))
        yield RowUpdate(request, tokens.tolist(), log_probs.tolist(), active)


def refuse_nan(log_probs: np.ndarray) -> None:
    """Refuse what was computed from logits that are NaN or infinite: it is no answer.

    Raises:
        RunError: a log-probability is NaN.

    """
    if np.isnan(log_probs).any():
        raise RunError(
            "The model's logits are NaN or infinite, so no token is likelier than another. Its "
            "weights or its adapter are damaged, or too large for the dtype it computes in."
        )
