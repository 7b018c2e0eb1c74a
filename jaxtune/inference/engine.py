"""Generation by continuous batching: answers share the rows of one cache.

Requests come and go while others are written; a row that is free takes the next prompt.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxtune.core.distributed import fetch
from jaxtune.inference import programs
from jaxtune.inference.prefill import Prefiller, TokenIds, bucket
from jaxtune.inference.programs import MAX_STEPS, Prefilled
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.scheduler import (
    CANCELLED,
    LENGTH,
    STOPPED,
    WATCHED,
    Answer,
    AnswerPiece,
    Request,
    RowUpdate,
    Scheduler,
    Watch,
    refuse_nan,
)
from jaxtune.inference.speed import Speed
from jaxtune.models.decoder import CausalLM

_WATCHED_STEPS = 16  # between two looks at answers that something but a token may end


class Engine:
    """Generation and scoring with one model.

    `submit` and `cancel` change what is written; `step` does the next piece of work. `answers`,
    `stream` and `generate` do this for a given list of prompts. What shares the rows does not
    change an answer, beyond rounding.

    Args:
        model: the model, with or without an adapter.
        stop_ids: tokens that end an answer.
        batch: the most rows that are computed together.

    """

    def __init__(self, model: CausalLM, stop_ids: Sequence[int], batch: int = 32) -> None:
        self.stop_ids, self.batch = tuple(stop_ids), batch
        self._prefiller = Prefiller(model)
        self._scheduler = Scheduler(self._prefiller, self.stop_ids, batch)

    @property
    def speed(self) -> Speed:
        """Tokens and seconds so far."""
        return self._prefiller.speed

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle

    def submit(
        self,
        prompt: TokenIds,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        number: int = 0,
        watch: Watch | None = None,
        interval: int | None = None,
    ) -> Request:
        """Queue a prompt, behind those that wait.

        Args:
            prompt: its ids.
            max_new_tokens: how many tokens the answer may have.
            sampling: greedy by default.
            number: with the seed it determines the draws, whatever else is submitted.
            watch: see `Watch`.
            interval: the most tokens between two pieces.

        Returns:
            The request; its `pieces` and `answer` grow with every `step`.

        Raises:
            UserError: the prompt is empty, or has a token that the model does not have.

        """
        self._prefiller.check([prompt])
        longest = _WATCHED_STEPS if watch else MAX_STEPS
        request = Request(
            prompt,
            max_new_tokens,
            sampling or Sampling(),
            number,
            watch=watch,
            interval=min(interval or longest, MAX_STEPS),
        )
        if max_new_tokens < 1:
            self._finish(request, AnswerPiece([], [], LENGTH))
        else:
            self._scheduler.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End an answer; what is written stays. Its row is free at once.

        An answer that has ended stays as it is.
        """
        if request.answer.end is None:
            self._scheduler.leave(request)
            self._finish(request, AnswerPiece([], [], CANCELLED))

    def step(self) -> None:
        """Read waiting prompts into free rows, or else continue all answers by some tokens.

        Without anything to do it does nothing.
        """
        scheduler = self._scheduler
        if scheduler.can_admit:
            written = scheduler.admit()
        elif scheduler.active:
            written = scheduler.decode(
                min(request.interval for request in scheduler.active.values())
            )
        else:
            return
        for update in list(written):
            self._take(update)

    def _take(self, update: RowUpdate) -> None:
        """Add what was written to an answer, and see whether that ends it."""
        request, tokens, log_probs, active = update
        request.add(tokens, log_probs)
        keep = None
        if request.watch and tokens:
            keep = request.watch(request.number, request.answer.tokens)
        end = None if active else LENGTH if request.full else STOPPED
        if keep is not None:
            kept = len(tokens) - (len(request.answer.tokens) - keep)
            request.drop_after(keep)
            tokens, log_probs, end = tokens[:kept], log_probs[:kept], WATCHED
        elif end == STOPPED and request.left == 0:  # it outgrew the model's rope_limit
            self._scheduler.leave(request)
            self._scheduler.waiting.appendleft(request)
            end = None
        if end:
            self._scheduler.leave(request)
        self._finish(request, AnswerPiece(tokens, log_probs, end))

    @staticmethod
    def _finish(request: Request, piece: AnswerPiece) -> None:
        request.answer.end = piece.end
        request.pieces.append(piece)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Return the tokens after each prompt, without the stop token; see `answers`."""
        answers = self.answers(prompts, max_new_tokens, sampling, progress)
        return [answer.tokens for answer in answers]

    def answers(
        self,
        prompts: Sequence[TokenIds],
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] | None = None,
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> list[Answer]:
        """Return the answer to each prompt.

        Args:
            prompts: ids of each prompt, of any lengths, none empty.
            max_new_tokens: how many tokens each answer may have.
            sampling: for all, or one for each prompt; greedy by default.
            progress: called with the number of prompts that are done.
            watch: see `Watch`.

        Raises:
            UserError: a prompt is empty, or has a token that the model does not have.

        """
        requests = self._submit_all(prompts, max_new_tokens, sampling, watch)
        done = 0
        try:
            while not all(request.answer.end for request in requests):
                self.step()
                finished = sum(request.answer.end is not None for request in requests)
                if progress and finished > done:
                    done = finished
                    progress(done)
        except BaseException:  # such as Ctrl-C: the rows are for those who come next
            for request in requests:
                self.cancel(request)
            raise
        return [request.answer for request in requests]

    def stream(
        self,
        prompt: TokenIds,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        watch: Watch | None = None,
        interval: int | None = None,
    ) -> Iterator[AnswerPiece]:
        """Yield the answer to one prompt as it comes, piece by piece.

        A consumer that stops early cancels it. Arguments and errors: see `submit`.
        """
        request = self.submit(prompt, max_new_tokens, sampling, watch=watch, interval=interval)
        try:
            while request.pieces or request.answer.end is None:
                if request.pieces:
                    yield request.pieces.popleft()
                else:
                    self.step()
        finally:
            self.cancel(request)

    def _submit_all(
        self,
        prompts: Sequence[TokenIds],
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] | None,
        watch: Watch | None,
    ) -> list[Request]:
        """Queue prompts that are known together.

        Long prompts come first, so that prompts of about the same length are read together, and
        what all begin with is read once. The draws of a prompt depend on its place in `prompts`.
        """
        self._prefiller.check(prompts)
        if sampling is None or isinstance(sampling, Sampling):
            settings = [sampling or Sampling()] * len(prompts)
        else:
            settings = list(sampling)
        requests: dict[int, Request] = {}
        for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
            requests[number] = self.submit(
                prompts[number],
                max_new_tokens,
                settings[number],
                number=number,
                watch=watch,
            )
        if max_new_tokens > 0 and prompts:
            positions = bucket(max(map(len, prompts)) + max_new_tokens)
            prefix = self._prefiller.prefix(prompts, positions)
            for request in requests.values():
                request.prefix = prefix
        return [requests[number] for number in range(len(prompts))]

    def prefill(self, prompts: Sequence[TokenIds], room: int) -> Prefilled:
        """Read the prompts into a cache with `room` for more tokens; further rows are padding.

        Raises:
            UserError: a prompt is empty, or has a token that the model does not have.

        """
        self._prefiller.check(prompts)
        positions = bucket(max(map(len, prompts)) + room)
        rows = 1 if len(prompts) == 1 else self.batch
        prefix = self._prefiller.prefix(prompts, positions)
        return self._prefiller.read(prompts, rows, positions, prefix)

    def continue_from(self, prefilled: Prefilled, rows: int, count: int) -> list[list[int]]:
        """Decode greedily up to `count` tokens after each of the first prefilled prompts.

        Args:
            prefilled: what `prefill` returned; its cache is used up.
            rows: how many of its rows hold a prompt.
            count: how many tokens each answer may have.

        """
        requests = [Request((), count, number=number) for number in range(rows)]
        scheduler = Scheduler(self._prefiller, self.stop_ids, self.batch)
        written = scheduler.begin(requests, prefilled)
        while True:
            for update in list(written):
                update.request.add(update.tokens, update.log_probs)
                if not update.active:
                    scheduler.leave(update.request)
            if not scheduler.active:
                return [request.answer.tokens for request in requests]
            written = scheduler.decode(MAX_STEPS)

    def score(
        self, prefilled: Prefilled, continuations: Sequence[TokenIds]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score one continuation a prompt.

        Returns:
            The sum of each one's token log-probabilities, in nats, and whether greedy decoding
            gives it.

        Raises:
            RunError: one is NaN.

        """
        rows = prefilled.lengths.shape[0]
        ids = np.zeros((rows, bucket(max(map(len, continuations)), 2)), np.int32)
        counts = np.zeros(rows, np.int32)
        for row, tokens in enumerate(continuations):
            ids[row, : len(tokens)], counts[row] = tokens, len(tokens)
        model = self._prefiller
        sums, likeliest = fetch(programs.score(model.graph, model.weights, prefilled, ids, counts))
        refuse_nan(sums[: len(continuations)])
        return sums[: len(continuations)], likeliest[: len(continuations)]
