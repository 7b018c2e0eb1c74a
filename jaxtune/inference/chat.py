"""A conversation in a terminal: answers as they come, and the untuned model beside them."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxtune.core.errors import UserError
from jaxtune.data.chat.tokenize import prompt_ids
from jaxtune.data.formats.conversation import Conversation
from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.text import TextGenerator
from jaxtune.workflows.load import LoadedModel, with_tokenizer

HELP = """/base           what the model said before training, beside its last answer
/system [TEXT]  a new conversation with this system prompt; without TEXT, none
/retry          another answer to the last question
/new            a new conversation
/help           this
/quit           leave, as Ctrl-D does
Ctrl-C stops an answer, and between answers begins a new conversation. A line that ends with \\ goes on in the next."""


class ChatModel:
    """A model that answers conversations.

    Args:
        loaded: the model.
        sampling: how tokens are chosen.
        most: tokens of an answer at most.

    """

    def __init__(self, loaded: LoadedModel, sampling: Sampling, most: int) -> None:
        self.tokenizer, self.sampling, self.most = with_tokenizer(loaded), sampling, most
        self._room = loaded.model.config.max_positions
        self.engine = Engine(loaded.model, loaded.stop_ids, batch=1)
        self._speaker = TextGenerator(self.engine, self.tokenizer)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids that an answer begins behind, through the model's own chat template."""
        return prompt_ids(self.tokenizer, Conversation("the conversation", messages))

    def answer(self, messages: list[dict[str, Any]], attempt: int = 0) -> Iterator[str]:
        """The answer, as it comes; another one at every attempt where tokens are drawn.

        Raises:
            UserError: the conversation is longer than the model's positions.

        """
        ids = self.prompt(messages)
        room = self._room - len(ids)
        if room < 1:
            raise UserError(
                f"The conversation has {len(ids):,} tokens and the model {self._room:,} "
                "positions. Begin a new one: /new"
            )
        sampling = Sampling(**(vars(self.sampling) | {"seed": self.sampling.seed + attempt}))
        yield from self._speaker.stream(ids, min(self.most, room), sampling)


class Chat:
    """Reads what the user writes, and answers.

    Args:
        voice: the model.
        base: opens what it was before training; None where there is nothing.
        system: the system prompt.
        console: where answers go.
        read: gives the user's next line; raises EOFError at the end.

    """

    def __init__(
        self,
        voice: ChatModel,
        base: Callable[[], ChatModel] | None,
        system: str | None,
        console: Console,
        read: Callable[[str], str] = input,
    ) -> None:
        self.voice, self._open_base, self.system, self.console, self._read = (
            voice,
            base,
            system,
            console,
            read,
        )
        self._base: ChatModel | None = None
        self._attempts = 0
        self.messages: list[dict[str, Any]] = []
        self._begin()

    def run(self) -> None:
        """Until the user leaves."""
        while True:
            try:
                line = self._line()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self._begin()
                self.console.print("\n(a new conversation; Ctrl-D or /quit leaves)", style="dim")
                continue
            if line.strip() == "/quit":
                return
            if line.strip():
                try:
                    self._heard(line)
                except UserError as error:
                    self.console.print(str(error), style="yellow", markup=False)

    def _line(self) -> str:
        line = self._read("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._read("  ")
        return line

    def _heard(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        commands = {
            "/base": self._beside,
            "/retry": self._retry,
            "/new": self._begin,
            "/help": self._help,
        }
        if word == "/system":
            self.system = rest.strip() or None
            self._begin()
            self.console.print("(a new conversation)", style="dim")
        elif word in commands:
            commands[word]()
        elif word.startswith("/") and word[1:].isalpha():
            raise UserError(f"There is no {word}. /help lists what there is.")
        else:
            self.messages.append({"role": "user", "content": line})
            self._attempts = 0
            self._answer()

    def _begin(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def _help(self) -> None:
        self.console.print(HELP, markup=False)

    def _retry(self) -> None:
        if not self._answered():
            raise UserError("There is no answer yet.")
        self.messages.pop()
        self._attempts += 1
        self._answer()

    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def _answer(self) -> None:
        """Say the answer as it comes. What was said when Ctrl-C came is the answer; a question
        that got none is taken back.
        """
        speed, said = self.voice.engine.speed, ""
        before = speed.new_tokens, speed.decode_seconds
        try:
            for part in self.voice.answer(self.messages, self._attempts):
                said += part
                self.console.out(part, end="", highlight=False)
        except KeyboardInterrupt:
            self.console.out(" ...", end="")
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()
        self.console.print()
        tokens, seconds = speed.new_tokens - before[0], speed.decode_seconds - before[1]
        if tokens and self.console.is_terminal:
            self.console.print(f"({tokens / seconds:,.0f} tok/s)", style="dim", markup=False)

    def _beside(self) -> None:
        """The last answer, and what the model would have said before training, in two columns."""
        if self._open_base is None:
            raise UserError(
                "This model has no adapter and is no run, so there is nothing that it was before."
            )
        if not self._answered():
            raise UserError("Ask something first; /base then answers the same.")
        if self._base is None:
            self._base = self._open_base()
        mine, said = self.messages[-1]["content"], ""
        try:
            with Live(
                _columns(mine, said),
                console=self.console,
                auto_refresh=False,
                vertical_overflow="visible",
            ) as live:
                for part in self._base.answer(self.messages[:-1], self._attempts):
                    said += part
                    live.update(_columns(mine, said), refresh=True)
            if not self.console.is_terminal:
                self.console.print()
        except KeyboardInterrupt:
            return


def _columns(tuned: str, base: str) -> Table:
    table = Table(expand=True)
    for name in ("this model", "before training"):
        table.add_column(name, ratio=1)
    table.add_row(Text(tuned), Text(base))
    return table
