"""Generation by continuous batching: answers share the rows of one cache, and a row that is free takes the next prompt."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxtune.core.errors import UserError
from jaxtune.core.processes import fetch
from jaxtune.generate import slots as programs
from jaxtune.generate.sampling import Sampling
from jaxtune.generate.slots import MOST_STEPS, Chosen, Prefilled, Slots
from jaxtune.models.cache import Cache, make_cache
from jaxtune.models.decoder import CausalLM

_LEAST_PREFIX = 16
_LEAST_BUCKET = 16
_WATCHED_STEPS = 16  # between two looks at answers that something but a token may end

Prompt = Sequence[int]
Watch = Callable[[int, list[int]], int | None]
"""Called with a prompt's number and its answer when that has grown; a number of tokens, not before the new ones, ends it there."""

STOPPED, LENGTH, WATCHED = "stop", "length", "watch"


class Piece(NamedTuple):
    """New tokens of an answer.

    Attributes:
        number: of the prompt.
        tokens: the new ones.
        log_probs: their log-probabilities under the model, in nats.
        end: why the answer has ended: `stop` (a stop token, which is not part of it), `length`, or `watch`; None while it goes on.

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


@dataclass
class Speed:
    """Tokens and seconds of an engine so far, what was compiled not counted."""

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


@dataclass(eq=False)
class _Request:
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
        """Its context is read. A text that grows past `limit`, the model's `rope_limit`, is read anew there, as a long one."""
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


class Engine:
    """Generation and scoring with one model.

    Args:
        model: the model, with or without an adapter.
        stop_ids: tokens that end an answer.
        batch: rows that are computed together.

    """

    def __init__(self, model: CausalLM, stop_ids: Sequence[int], batch: int = 32) -> None:
        self.graph, self.state = nnx.split(model)
        self.config, self.dtype = model.config, model.compute_dtype
        self.stop_ids, self.batch = tuple(stop_ids), batch
        self.speed = Speed()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """The tokens generated after each prompt, up to and without the first stop token; see `answers`."""
        return [answer.tokens for answer in self.answers(prompts, max_new_tokens, sampling, progress)]

    def answers(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> list[Answer]:
        """The answer to each prompt.

        Args:
            prompts: ids of each prompt, of any lengths, none empty.
            max_new_tokens: at most so many tokens each.
            sampling: greedy by default.
            progress: called with the number of prompts done.
            watch: see `Watch`.

        """
        found = [Answer() for _ in prompts]
        done = 0
        for piece in self.stream(prompts, max_new_tokens, sampling, watch):
            answer = found[piece.number]
            answer.tokens += piece.tokens
            answer.log_probs += piece.log_probs
            answer.end = piece.end
            done += piece.end is not None
            if progress and piece.end:
                progress(done)
        return found

    def stream(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        watch: Watch | None = None,
        every: int | None = None,
    ) -> Iterator[Piece]:
        """The answers as they come, piece by piece.

        Long prompts begin first, so that prompts of about the same length are read together. A prompt's draws depend on its place in
        `prompts` alone, and so neither do its tokens on what is beside it.

        Args:
            prompts: as in `answers`.
            max_new_tokens: at most so many tokens each.
            sampling: greedy by default.
            watch: see `Watch`.
            every: tokens of an answer that come together at most.

        Raises:
            UserError: a prompt is empty, or has a token that the model has not.

        """
        self._check(prompts)
        if max_new_tokens < 1 or not prompts:
            yield from (Piece(number, [], [], LENGTH) for number in range(len(prompts)))
            return
        requests = [_Request(number, prompt, max_new_tokens) for number, prompt in enumerate(prompts)]
        queue = deque(sorted(requests, key=lambda request: -len(request.prompt)))
        size = _bucket(max(map(len, prompts)) + max_new_tokens)
        run = _Run(self, sampling or Sampling(), size, self._prefix(prompts, size))
        steps = min(every or (_WATCHED_STEPS if watch else MOST_STEPS), MOST_STEPS)
        while queue or run.taken:
            news = run.admit(queue) if queue and run.free >= run.enough else run.decode(steps, waiting=bool(queue))
            for request, tokens, log_probs, going in news:
                request.add(tokens, log_probs)
                keep = watch(request.number, request.answer.tokens) if watch and tokens else None
                end = None if going else LENGTH if request.full else STOPPED
                if keep is not None:
                    surplus = len(request.answer.tokens) - keep
                    tokens, log_probs, end = tokens[: len(tokens) - surplus], log_probs[: len(tokens) - surplus], WATCHED
                elif end == STOPPED and request.left == 0:
                    queue.appendleft(request)
                    end = None
                if end or request in queue:
                    run.leave(request)
                yield Piece(request.number, tokens, log_probs, end)

    def prefill(self, prompts: Sequence[Prompt], room: int) -> Prefilled:
        """Read the prompts into a cache with `room` slots for what follows; rows beyond them are padding.

        Raises:
            UserError: a prompt is empty, or has a token that the model has not.

        """
        self._check(prompts)
        size = _bucket(max(map(len, prompts)) + room)
        return self._read(prompts, size, self._prefix(prompts, size), 1 if len(prompts) == 1 else self.batch)

    def continue_from(self, prefilled: Prefilled, rows: int, count: int) -> list[list[int]]:
        """Greedily up to `count` tokens after each of the first `rows` prefilled prompts, whose cache is used up."""
        requests = [_Request(number, (), count) for number in range(rows)]
        run = _Run(self, Sampling(), 0, None)
        news = run.begin(requests, prefilled)
        while True:
            for request, tokens, log_probs, going in news:
                request.add(tokens, log_probs)
                if not going:
                    run.leave(request)
            if not run.taken:
                return [request.answer.tokens for request in requests]
            news = run.decode(MOST_STEPS, waiting=False)

    def score(self, prefilled: Prefilled, continuations: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Of one continuation per prompt, its tokens' log-probabilities summed, in nats, and whether greedy decoding would give it."""
        rows = prefilled.lengths.shape[0]
        ids = np.zeros((rows, _bucket(max(map(len, continuations)), 2)), np.int32)
        counts = np.zeros(rows, np.int32)
        for row, tokens in enumerate(continuations):
            ids[row, : len(tokens)], counts[row] = tokens, len(tokens)
        sums, likeliest = fetch(programs.score(self.graph, self.state, prefilled, ids, counts))
        return sums[: len(continuations)], likeliest[: len(continuations)]

    def _check(self, prompts: Sequence[Prompt]) -> None:
        self.config.check_tokens(prompts)
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError("An empty prompt: there is nothing to go on from.")

    def _prefix(self, prompts: Sequence[Prompt], size: int) -> tuple[Cache, int] | None:
        """What all prompts begin with, read once, and its length; None where it does not pay."""
        common = 0 if self.config.rope_limit else _common_prefix(prompts)
        if not common:
            return None
        ids = np.asarray([prompts[0][:common]], np.int32)
        return self._timed(self._empty(1, size), ids, 0, np.asarray([common], np.int32), common).cache, common

    def _read(self, prompts: Sequence[Prompt], size: int, prefix: tuple[Cache, int] | None, rows: int) -> Prefilled:
        cache, common = (prefix[0].repeat(rows), prefix[1]) if prefix else (self._empty(rows, size), 0)
        ids = np.zeros((rows, _bucket(max(map(len, prompts)) - common)), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - common] = prompt[common:]
            lengths[row] = len(prompt) - common
        return self._timed(cache, ids, common, lengths, int(lengths[: len(prompts)].sum()))

    def _timed(self, cache: Cache, ids: np.ndarray, start: int, lengths: np.ndarray, tokens: int) -> Prefilled:
        with _seconds() as taken:
            read = programs.prefill(self.graph, self.state, cache, ids, np.int32(start), lengths)
            read.logits.block_until_ready()
        self.speed.prompt_tokens += tokens
        self.speed.prefill_seconds += taken[0]
        return read

    def _empty(self, rows: int, size: int) -> Cache:
        return make_cache(self.config, rows, size, self.dtype)


_News = Iterator[tuple[_Request, list[int], list[float], bool]]


class _Run:
    """The rows of one call and who has them."""

    def __init__(self, engine: Engine, sampling: Sampling, size: int, prefix: tuple[Cache, int] | None) -> None:
        self.engine, self.sampling, self.size, self.prefix = engine, sampling, size, prefix
        self.slots: Slots | None = None
        self.taken: dict[int, _Request] = {}
        self._ended: set[int] = set()

    @property
    def rows(self) -> int:
        """How many answers are computed together."""
        return self.engine.batch if self.slots is None else len(self.slots.token)

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return self.rows - len(self.taken)

    @property
    def enough(self) -> int:
        """From so many free rows on it pays to read the next prompts."""
        return max(1, self.rows // 4)

    def leave(self, request: _Request) -> None:
        """Its row is free."""
        for row in [row for row, other in self.taken.items() if other is request]:
            del self.taken[row]
            self._ended.add(row)

    def admit(self, queue: deque[_Request]) -> _News:
        """Read the next prompts into free rows."""
        requests = [queue.popleft() for _ in range(min(self.free, len(queue)))]
        rows = min(_bucket(len(requests), 1), self.rows)
        contexts = [request.context for request in requests]
        return self.begin(requests, self.engine._read(contexts, self.size, self.prefix, rows))

    def begin(self, requests: list[_Request], read: Prefilled) -> _News:
        """The first tokens of answers whose prompts were read."""
        rows, sampling, engine = len(read.lengths), self.sampling, self.engine
        numbers, who, left = (np.zeros(rows, np.int32) for _ in range(3))
        seen = np.zeros((rows, engine.config.vocab_size if sampling.remembers else 0), bool)
        for row, request in enumerate(requests):
            who[row], numbers[row] = request.number, len(request.answer.tokens)
            request.read(engine.config.rope_limit)
            left[row] = request.left
            if sampling.remembers:
                seen[row, request.context] = True
        new, chosen = programs.begin(sampling, engine.stop_ids, *read, numbers, who, left, seen)
        if self.slots is None:
            self.slots, places = new, list(range(len(requests)))
        else:
            places = [row for row in range(self.rows) if row not in self.taken][: len(requests)]
            beyond = [self.rows] * (rows - len(places))
            self.slots = programs.put(self.slots, new, np.asarray([*places, *beyond], np.int32))
        self._ended -= set(places)
        self.taken |= dict(zip(places, requests, strict=True))
        return self._news(fetch(chosen), list(enumerate(requests)))

    def decode(self, steps: int, *, waiting: bool) -> _News:
        """Go on with all answers, until enough rows are free for those who wait."""
        assert self.slots is not None
        ended = np.zeros(self.rows, bool)
        ended[list(self._ended)] = True
        least = self.rows - self.enough if waiting else 0
        engine = self.engine
        with _seconds() as taken:
            self.slots, chosen = programs.decode(
                engine.graph, engine.stop_ids, self.sampling, engine.state, self.slots, ended, np.int32(steps), np.int32(least)
            )
            found = fetch(chosen)
        engine.speed.new_tokens += int(found.made.sum())
        engine.speed.decode_seconds += taken[0]
        return self._news(found, list(self.taken.items()))

    def _news(self, chosen: Chosen, who: list[tuple[int, _Request]]) -> _News:
        for row, request in who:
            made = int(chosen.made[row])
            yield request, chosen.tokens[row, :made].tolist(), chosen.log_probs[row, :made].tolist(), bool(chosen.going[row])


@contextmanager
def _seconds() -> Iterator[list[float]]:
    """How long the block took, in the list once it is over, without what was spent on compiling."""
    taken, compiling = [0.0], [0.0]

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        compiling[0] += duration_secs if event.startswith("/jax/core/compile/") else 0.0

    jax.monitoring.register_event_duration_secs_listener(compiled)
    began = time.perf_counter()
    try:
        yield taken
    finally:
        taken[0] = max(time.perf_counter() - began - compiling[0], 0.0)
        jax.monitoring.unregister_event_duration_listener(compiled)


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """Tokens that all prompts begin with, rounded down so that few lengths compile; 0 where it does not pay."""
    if len(prompts) < 2:
        return 0
    least = min(map(len, prompts)) - 1
    first = prompts[0]
    shared = next((at for at in range(least) if any(prompt[at] != first[at] for prompt in prompts)), least)
    return shared - shared % _LEAST_PREFIX


def _bucket(size: int, least: int = _LEAST_BUCKET) -> int:
    """The next of a few sizes: 16, 24, 32, 48, 64, 96 ... so that shapes stay few."""
    bucket = least
    while bucket < size:
        half = bucket * 3 // 2
        bucket = half if bucket & (bucket - 1) == 0 and bucket > 1 and half >= size else 1 << bucket.bit_length()
    return bucket
