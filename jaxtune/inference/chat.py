"""A conversation in a terminal: answers as they come, and the untuned model beside them."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxtune.core.errors import UserError
from jaxtune.core.text import visible
from jaxtune.data.chat.tokenize import prompt_ids
from jaxtune.data.formats.conversation import Conversation
from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.text import TextGenerator
from jaxtune.weights.loaded import LoadedModel

HELP = """/base           what the model said before training, beside its last answer
/system [TEXT]  a new conversation with this system prompt; without TEXT, none
/retry          another answer to the last question
/new            a new conversation
/help           this text
/quit           leave, as Ctrl-D does
Ctrl-C stops an answer, and between answers begins a new conversation. A line that ends
with \\ continues on the next one."""


class ChatModel:
    """A model that answers conversations.

    Args:
        loaded: the model.
        sampling: how tokens are chosen.
        max_new_tokens: how many tokens an answer may have.

    """

    def __init__(self, loaded: LoadedModel, sampling: Sampling, max_new_tokens: int) -> None:
        self.tokenizer = loaded.require_tokenizer()
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self._positions = loaded.model.config.max_positions
        self.engine = Engine(loaded.model, loaded.stop_ids, batch=1)
        self._generator = TextGenerator(self.engine, self.tokenizer)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the ids before the answer, through the model's own chat template."""
        return prompt_ids(self.tokenizer, Conversation("the conversation", messages))

    def answer(self, messages: list[dict[str, Any]], attempt: int = 0) -> Iterator[str]:
        """Yield the answer as it comes; where tokens are drawn, another one at every attempt.

        Raises:
            UserError: the conversation has more tokens than the model has positions.

        """
        ids = self.prompt(messages)
        room = self._positions - len(ids)
        if room < 1:
            raise UserError(
                f"The conversation has {len(ids):,} tokens and the model {self._positions:,} "
                "positions. Begin a new one: /new"
            )
        sampling = Sampling(**(vars(self.sampling) | {"seed": self.sampling.seed + attempt}))
        yield from self._generator.stream(ids, min(self.max_new_tokens, room), sampling)


class Chat:
    """A chat session: it reads what the user writes, and answers.

    Args:
        model: the model.
        open_base: opens the model before training; None where there is none.
        system: the system prompt.
        console: where answers go.
        read: returns the user's next line; raises EOFError at the end.

    """

    def __init__(
        self,
        model: ChatModel,
        open_base: Callable[[], ChatModel] | None,
        system: str | None,
        console: Console,
        read: Callable[[str], str] = input,
    ) -> None:
        self.model, self._open_base, self.system = model, open_base, system
        self.console, self._read = console, read
        self._base: ChatModel | None = None
        self._attempts = 0
        self.messages: list[dict[str, Any]] = []
        self._start_over()

    def run(self) -> None:
        """Answer until the user leaves."""
        while True:
            try:
                line = self._read_line()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self._start_over()
                self.console.print("\n(a new conversation; Ctrl-D or /quit leaves)", style="dim")
                continue
            if line.strip() == "/quit":
                return
            if line.strip():
                try:
                    self._handle(line)
                except UserError as error:
                    self.console.print(visible(str(error)), style="yellow", markup=False)

    def _read_line(self) -> str:
        line = self._read("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._read("  ")
        return line

    def _handle(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        commands = {
            "/base": self._compare,
            "/retry": self._retry,
            "/new": self._start_over,
            "/help": self._help,
        }
        if word == "/system":
            self.system = rest.strip() or None
            self._start_over()
            self.console.print("(a new conversation)", style="dim")
        elif word in commands:
            commands[word]()
        elif word.startswith("/") and word[1:].isalpha():
            raise UserError(f"There is no {word}. /help lists what there is.")
        else:
            self.messages.append({"role": "user", "content": line})
            self._attempts = 0
            self._answer()

    def _start_over(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def _help(self) -> None:
        self.console.print(HELP, markup=False)

    def _retry(self) -> None:
        if not self._has_answer():
            raise UserError("There is no answer yet.")
        self.messages.pop()
        self._attempts += 1
        self._answer()

    def _has_answer(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def _answer(self) -> None:
        """Print the answer as it comes.

        After Ctrl-C the answer is what was printed; a question without any is taken back.
        """
        speed, text = self.model.engine.speed, ""
        before = speed.new_tokens, speed.decode_seconds
        try:
            for part in self.model.answer(self.messages, self._attempts):
                text += part
                shown = visible(part) if self.console.is_terminal else part
                self.console.out(shown, end="", highlight=False)
        except KeyboardInterrupt:
            self.console.out(" ...", end="")
        finally:
            if text:
                self.messages.append({"role": "assistant", "content": text})
            else:
                self.messages.pop()
        self.console.print()
        tokens, seconds = speed.new_tokens - before[0], speed.decode_seconds - before[1]
        if tokens and self.console.is_terminal:
            self.console.print(f"({tokens / seconds:,.0f} tok/s)", style="dim", markup=False)

    def _compare(self) -> None:
        """Print the last answer beside that of the model before training, in two columns."""
        if self._open_base is None:
            raise UserError(
                "This model has no adapter and is no run, so there is no model before training."
            )
        if not self._has_answer():
            raise UserError("Ask something first; /base then answers the same.")
        if self._base is None:
            self._base = self._open_base()
        tuned, base = self.messages[-1]["content"], ""
        try:
            with Live(
                _columns(tuned, base),
                console=self.console,
                auto_refresh=False,
                vertical_overflow="visible",
            ) as live:
                for part in self._base.answer(self.messages[:-1], self._attempts):
                    base += part
                    live.update(_columns(tuned, base), refresh=True)
            if not self.console.is_terminal:
                self.console.print()
        except KeyboardInterrupt:
            return


def _columns(tuned: str, base: str) -> Table:
    table = Table(expand=True)
    for name in ("this model", "before training"):
        table.add_column(name, ratio=1)
    table.add_row(Text(visible(tuned)), Text(visible(base)))
    return table
