"""Generation in text: stop strings, and answers as they come."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.inference.engine import WATCHED, Engine, Prompt
from jaxtune.inference.sampling import Sampling

STRING = "string"
_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character whose others are yet to come


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: up to and without the first stop token or stop string.
        tokens: its ids; with a stop string, through the token that completes it.
        log_probs: their log-probabilities under the model, in nats, before anything of the
            sampling.
        end: why it ended: `stop` (a token), `string` or `length`.

    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    end: str


class TextGenerator:
    """An engine with the tokenizer of its model.

    Args:
        engine: the engine.
        tokenizer: its tokenizer.
        stop: strings that end an answer and are not part of it.

    Raises:
        UserError: an empty stop string.

    """

    def __init__(self, engine: Engine, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UserError("A stop string is empty: every answer would end before it begins.")
        self.engine, self.tokenizer, self.stop = engine, tokenizer, tuple(stop)

    def answers(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """The answer to each prompt; arguments as in `Engine.answers`."""
        found = self.engine.answers(
            prompts, max_new_tokens, sampling, progress, self._watch if self.stop else None
        )
        said = []
        for answer in found:
            text = self._text(answer.tokens)
            end = STRING if answer.end == WATCHED else answer.end or ""
            said.append(Completion(self._cut(text), answer.tokens, answer.log_probs, end))
        return said

    def stream(
        self, prompt: Prompt, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """The answer to one prompt, as it comes; the parts together are its text."""
        tokens, shown = [], 0
        watch = self._watch if self.stop else None
        for piece in self.engine.stream([prompt], max_new_tokens, sampling, watch, every=1):
            tokens += piece.tokens
            text = self._cut(self._text(tokens))
            ready = len(text) if piece.end else self._certain(text)
            if ready > shown:
                yield text[shown:ready]
                shown = ready

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _cut(self, text: str) -> str:
        """Up to the first stop string."""
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        return text[: min(ends)] if ends else text

    def _certain(self, text: str) -> int:
        """How much of it stays as it is, whatever comes: no half characters, nothing that may
        begin a stop string.
        """
        text = text.rstrip(_UNFINISHED)
        possible = (
            size
            for stop in self.stop
            for size in range(min(len(stop), len(text)), 0, -1)
            if stop.startswith(text[-size:])
        )
        return len(text) - max(possible, default=0)

    def _watch(self, number: int, tokens: list[int]) -> int | None:
        """Through which token an answer goes that has a stop string."""
        if len(self._cut(self._text(tokens))) == len(self._text(tokens)):
            return None
        fewest, enough = 0, len(tokens)  # tokens that have no stop string, and tokens that have one
        while enough - fewest > 1:
            middle = (fewest + enough) // 2
            text = self._text(tokens[:middle])
            fewest, enough = (
                (middle, enough) if len(self._cut(text)) == len(text) else (fewest, middle)
            )
        return enough
