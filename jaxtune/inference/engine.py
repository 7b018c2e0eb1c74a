"""Generation by continuous batching: answers share the rows of one cache, and a row that is free
takes the next prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxtune.core.distributed import fetch
from jaxtune.inference import programs
from jaxtune.inference.prefill import Prefiller, Prompt, bucket
from jaxtune.inference.programs import MOST_STEPS, Prefilled
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.scheduler import Answer, Piece, Request, Scheduler
from jaxtune.inference.speed import Speed
from jaxtune.models.decoder import CausalLM

_WATCHED_STEPS = 16  # between two looks at answers that something but a token may end

Watch = Callable[[int, list[int]], int | None]
"""Called with a prompt's number and its answer when that has grown; a number of tokens, not
before the new ones, ends it there.
"""

STOPPED, LENGTH, WATCHED = "stop", "length", "watch"


class Engine:
    """Generation and scoring with one model.

    Args:
        model: the model, with or without an adapter.
        stop_ids: tokens that end an answer.
        batch: rows that are computed together.

    """

    def __init__(self, model: CausalLM, stop_ids: Sequence[int], batch: int = 32) -> None:
        self.stop_ids, self.batch = tuple(stop_ids), batch
        self._reader = Prefiller(model)

    @property
    def speed(self) -> Speed:
        """How fast it was so far."""
        return self._reader.speed

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """The tokens generated after each prompt, up to and without the first stop token; see
        `answers`.
        """
        return [
            answer.tokens for answer in self.answers(prompts, max_new_tokens, sampling, progress)
        ]

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

        Long prompts begin first, so that prompts of about the same length are read together. A
        prompt's draws depend on its place in `prompts` alone, and so neither do its tokens on what
        is beside it.

        Args:
            prompts: as in `answers`.
            max_new_tokens: at most so many tokens each.
            sampling: greedy by default.
            watch: see `Watch`.
            every: tokens of an answer that come together at most.

        Raises:
            UserError: a prompt is empty, or has a token that the model has not.

        """
        self._reader.check(prompts)
        if max_new_tokens < 1 or not prompts:
            yield from (Piece(number, [], [], LENGTH) for number in range(len(prompts)))
            return
        requests = [
            Request(number, prompt, max_new_tokens) for number, prompt in enumerate(prompts)
        ]
        queue = deque(sorted(requests, key=lambda request: -len(request.prompt)))
        size = bucket(max(map(len, prompts)) + max_new_tokens)
        prefix = self._reader.prefix(prompts, size)
        rows = Scheduler(
            self._reader, self.stop_ids, sampling or Sampling(), self.batch, size, prefix
        )
        steps = min(every or (_WATCHED_STEPS if watch else MOST_STEPS), MOST_STEPS)
        while queue or rows.taken:
            news = (
                rows.admit(queue)
                if queue and rows.free >= rows.enough
                else rows.decode(steps, waiting=bool(queue))
            )
            for request, tokens, log_probs, going in news:
                request.add(tokens, log_probs)
                keep = watch(request.number, request.answer.tokens) if watch and tokens else None
                end = None if going else LENGTH if request.full else STOPPED
                if keep is not None:
                    surplus = len(request.answer.tokens) - keep
                    tokens, log_probs, end = (
                        tokens[: len(tokens) - surplus],
                        log_probs[: len(tokens) - surplus],
                        WATCHED,
                    )
                elif end == STOPPED and request.left == 0:
                    queue.appendleft(request)
                    end = None
                if end or request in queue:
                    rows.leave(request)
                yield Piece(request.number, tokens, log_probs, end)

    def prefill(self, prompts: Sequence[Prompt], room: int) -> Prefilled:
        """Read the prompts into a cache with `room` slots for what follows; rows beyond them are
        padding.

        Raises:
            UserError: a prompt is empty, or has a token that the model has not.

        """
        self._reader.check(prompts)
        size = bucket(max(map(len, prompts)) + room)
        rows = 1 if len(prompts) == 1 else self.batch
        return self._reader.read(prompts, size, self._reader.prefix(prompts, size), rows)

    def continue_from(self, prefilled: Prefilled, rows: int, count: int) -> list[list[int]]:
        """Greedily up to `count` tokens after each of the first `rows` prefilled prompts, whose
        cache is used up.
        """
        requests = [Request(number, (), count) for number in range(rows)]
        shared = Scheduler(self._reader, self.stop_ids, Sampling(), self.batch, 0, None)
        news = shared.begin(requests, prefilled)
        while True:
            for request, tokens, log_probs, going in news:
                request.add(tokens, log_probs)
                if not going:
                    shared.leave(request)
            if not shared.taken:
                return [request.answer.tokens for request in requests]
            news = shared.decode(MOST_STEPS, waiting=False)

    def score(
        self, prefilled: Prefilled, continuations: Sequence[Prompt]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of one continuation per prompt, its tokens' log-probabilities summed, in nats, and
        whether greedy decoding would give it.
        """
        rows = prefilled.lengths.shape[0]
        ids = np.zeros((rows, bucket(max(map(len, continuations)), 2)), np.int32)
        counts = np.zeros(rows, np.int32)
        for row, tokens in enumerate(continuations):
            ids[row, : len(tokens)], counts[row] = tokens, len(tokens)
        sums, likeliest = fetch(
            programs.score(self._reader.graph, self._reader.state, prefilled, ids, counts)
        )
        return sums[: len(continuations)], likeliest[: len(continuations)]
