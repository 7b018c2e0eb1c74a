"""Generation in text: stop strings, and answers as they come."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxtune.core.errors import UserError
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.inference.engine import Engine
from jaxtune.inference.prefill import TokenIds
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.scheduler import WATCHED

STRING = "string"
_UNFINISHED = "\ufffd"  # a tokenizer writes it for the first bytes of a character


@dataclass(frozen=True)
class Completion:
    """An answer in text.

    Attributes:
        text: the answer without its stop token or stop string.
        tokens: its ids; with a stop string, through the token that completes it.
        log_probs: their log-probabilities under the model, in nats, before temperature, penalty
            and truncation.
        end: why it ended: `stop` (a token), `string` or `length`.

    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    end: str


class TextGenerator:
    """An engine with its model's tokenizer.

    Args:
        engine: the engine.
        tokenizer: its model's tokenizer.
        stop: strings that end an answer and are not part of it.

    Raises:
        UserError: a stop string is empty.

    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UserError("A stop string is empty: every answer would end before it begins.")
        self.engine, self.tokenizer, self.stop = engine, tokenizer, tuple(stop)

    def answers(
        self,
        prompts: Sequence[TokenIds],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Return the answer to each prompt; arguments as in `Engine.answers`."""
        watch = self._watch if self.stop else None
        completions = []
        for answer in self.engine.answers(prompts, max_new_tokens, sampling, progress, watch):
            text = self._truncate(self._decode(answer.tokens))
            end = STRING if answer.end == WATCHED else answer.end or ""
            completions.append(Completion(text, answer.tokens, answer.log_probs, end))
        return completions

    def stream(
        self, prompt: TokenIds, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Yield the answer to one prompt as it comes; the parts together are its text."""
        tokens, shown = [], 0
        watch = self._watch if self.stop else None
        pieces = self.engine.stream(prompt, max_new_tokens, sampling, watch=watch, interval=1)
        for piece in pieces:
            tokens += piece.tokens
            text = self._truncate(self._decode(tokens))
            ready = len(text) if piece.end else self._settled(text)
            if ready > shown:
                yield text[shown:ready]
                shown = ready

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _truncate(self, text: str) -> str:
        """Return the text before the first stop string."""
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        return text[: min(ends)] if ends else text

    def _settled(self, text: str) -> int:
        """Count the characters that stay as they are whatever comes.

        These are without half a character, and without what may begin a stop string.
        """
        text = text.rstrip(_UNFINISHED)
        possible = (
            size
            for stop in self.stop
            for size in range(min(len(stop), len(text)), 0, -1)
            if stop.startswith(text[-size:])
        )
        return len(text) - max(possible, default=0)

    def _has_stop(self, tokens: list[int]) -> bool:
        text = self._decode(tokens)
        return len(self._truncate(text)) < len(text)

    def _watch(self, number: int, tokens: list[int]) -> int | None:
        """Count the tokens through the one that completes a stop string; None without one."""
        if not self._has_stop(tokens):
            return None
        without, enough = 0, len(tokens)
        while enough - without > 1:
            middle = (without + enough) // 2
            if self._has_stop(tokens[:middle]):
                enough = middle
            else:
                without = middle
        return enough
