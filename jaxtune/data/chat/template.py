"""Rendering by the tokenizer's chat template, and the characters of a rendering that are answers.

Where the template marks them (`{% generation %}`), they are where it says. Elsewhere they are found
by position: the prompt that asks for an answer is rendered, and the conversation through that
answer; what the second has beyond the first is the answer in the template's frame, and the frame is
known from rendering a placeholder in its place. Nothing is searched for by its text.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.sources.row import RowError

# For base models whose rows are chats. It becomes the tokenizer's own template, so that it is
# exported with what was trained on it.
PLAIN_TEMPLATE = (
    "{{ %s }}{%% for m in messages %%}"
    "{{ '### ' + (m['role'] | capitalize) + ':\\n' + m['content'] + (eos_token if m['role'] == "
    "'assistant' else '') + '\\n\\n' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ '### Assistant:\\n' }}{%% endif %%}"
)
_PLACEHOLDER = "\ue000\ue001\ue000"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"""strftime_now\((["'])(.*?)\1\)""")
_FRAMES, _SHAPES = 16, 4096


class Span(NamedTuple):
    """Characters (or tokens) from `begin` to before `end`, whose prediction counts `weight`."""

    begin: int
    end: int
    weight: float


class Rendering(NamedTuple):
    """A conversation as text.

    Attributes:
        conversation: what was rendered; one answer's part of a row where the template rewrites
            earlier turns.
        text: the whole.
        spans: the answers in it that are trained.
        rewritten: whether the row had to be cut into one rendering an answer, because the template
            renders an answer differently once other messages follow.

    """

    conversation: Conversation
    text: str
    spans: tuple[Span, ...]
    rewritten: bool = False


class _Shape(NamedTuple):
    """What a template puts around the contents of conversations with the same roles.

    Attributes:
        frame: the texts before, between and behind the contents.
        stripped: whether contents lose the white space around them.
        before, after: how many characters the supervised span begins after an answer's first and
            ends after its last.
        answers: numbers and weights of the messages that are trained.

    """

    frame: tuple[str, ...]
    stripped: bool
    before: int
    after: int
    answers: tuple[tuple[int, float], ...]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: whose special tokens the template may use.
        template: the template's text, or several by name, as tokenizers hold them.
        day: the date that templates which print one are given; today's by default.

    """

    def __init__(self, tokenizer: Any, template: Any, day: date | None = None) -> None:
        self.tokenizer, self._template = tokenizer, template
        self._day = day
        self._frames: list[tuple[str, str]] = []
        self._shapes: dict[tuple, list[_Shape]] = {}

    @cached_property
    def marked(self) -> bool:
        """Whether the template marks the answers itself."""
        return bool(_GENERATION.search(self.source()))

    def source(self, tools: Any = None) -> str:
        """The template's text, the date filled in: a run that goes on tomorrow must see the same
        tokens.
        """
        day = self._day or date.today()
        template = (
            self._template
            if isinstance(self._template, str)
            else self.tokenizer.get_chat_template(tools=tools)
        )
        return _DATE.sub(lambda match: repr(day.strftime(match[2])), template)

    def render(self, asked: Sequence[tuple[Conversation, bool]]) -> list[str | RowError]:
        """The texts of conversations, each with whether the beginning of an answer is to follow;
        bad ones as errors.
        """
        if any(conversation.options for conversation, _ in asked):
            return [self._one(conversation, generate) for conversation, generate in asked]
        found: list[str | RowError] = [""] * len(asked)
        for generate in (False, True):
            places = [
                number
                for number, (conversation, wanted) in enumerate(asked)
                if wanted == generate and conversation.messages
            ]
            if not places:
                continue
            try:
                texts = self._apply([asked[number][0].messages for number in places], generate)
            except Exception:  # whatever it was, one by one tells of which row
                texts = [self._one(asked[number][0], generate) for number in places]
            for number, text in zip(places, texts, strict=True):
                found[number] = text
        return found

    def renderings(
        self, conversations: Sequence[Conversation], train_on: str
    ) -> list[list[Rendering] | RowError]:
        """The renderings of conversations with their answers; one for most, bad ones as errors."""
        wholes = self.render([(conversation, False) for conversation in conversations])
        found: list[list[Rendering] | RowError] = []
        unknown = []
        for number, (conversation, whole) in enumerate(zip(conversations, wholes, strict=True)):
            if isinstance(whole, RowError):
                found.append(whole)
                continue
            spans = self._by_shape(conversation, whole, train_on)
            found.append([Rendering(conversation, whole, spans or ())])
            if spans is None:
                unknown.append(number)
        for number in unknown:
            conversation, whole = conversations[number], _text(wholes[number])
            try:
                spans = self._by_shape(conversation, whole, train_on)  # known by now, perhaps
                found[number] = (
                    [Rendering(conversation, whole, spans)]
                    if spans
                    else self._thoroughly(conversation, whole, train_on)
                )
            except RowError as error:
                found[number] = error
        return found

    def _by_shape(
        self, conversation: Conversation, whole: str, train_on: str
    ) -> tuple[Span, ...] | None:
        """The answers of a conversation whose text is exactly the frame of one that was looked
        at thoroughly, with other contents.
        """
        shape = _shape(conversation, train_on)
        for known in self._shapes.get(shape, ()) if shape else ():
            parts: list[str] = []
            for before, message in zip(known.frame, conversation.messages, strict=False):
                parts += (
                    before,
                    message["content"].strip() if known.stripped else message["content"],
                )
            if "".join((*parts, known.frame[-1])) != whole:
                continue
            ends = list(accumulate(map(len, parts)))
            return tuple(
                Span(ends[2 * number] + known.before, ends[2 * number + 1] + known.after, weight)
                for number, weight in known.answers
            )
        return None

    def _thoroughly(self, conversation: Conversation, whole: str, train_on: str) -> list[Rendering]:
        """The answers of a conversation, each compared with the prompt that asks for it and with
        what follows it.
        """
        numbers = _answers(conversation, train_on)
        asked: list[tuple[Conversation, bool]] = []
        for number in numbers:
            asked += [(_before(conversation, number), True), (conversation.through(number), False)]
        texts = [_text(text) for text in self.render(asked)]
        parts = list(zip(numbers, texts[::2], texts[1::2], strict=True))
        found = self._assemble(conversation, whole, parts, train_on)
        if train_on != "all" and len(found) == 1 and not found[0].rewritten:
            self._learn_shape(conversation, found[0], train_on)
        return found

    def _learn_shape(self, conversation: Conversation, found: Rendering, train_on: str) -> None:
        """Keep the frame around the contents, so that the next conversation like this one needs
        a single rendering.
        """
        shape = _shape(conversation, train_on)
        numbers = _answers(conversation, train_on)
        if shape is None or len(numbers) != len(found.spans):
            return
        marks = [
            f"{_PLACEHOLDER}{number}{_PLACEHOLDER}" for number in range(len(conversation.messages))
        ]
        messages = [
            message | {"content": mark}
            for message, mark in zip(conversation.messages, marks, strict=True)
        ]
        text = self._one(replace(conversation, messages=messages), False)
        frame, rest = [], text if isinstance(text, str) else ""
        for mark in marks:
            head, there, rest = rest.partition(mark)
            if not there:
                return
            frame.append(head)
        for stripped in (False, True):
            contents = [
                message["content"].strip() if stripped else message["content"]
                for message in conversation.messages
            ]
            ends = list(
                accumulate(len(text) for pair in zip(frame, contents, strict=True) for text in pair)
            )
            offsets = {
                (span.begin - ends[2 * number], span.end - ends[2 * number + 1])
                for number, span in zip(numbers, found.spans, strict=True)
            }
            if len(offsets) > 1:
                continue
            before, after = offsets.pop() if offsets else (0, 0)
            answers = tuple(
                (number, span.weight) for number, span in zip(numbers, found.spans, strict=True)
            )
            known = _Shape((*frame, rest), stripped, before, after, answers)
            if len(self._shapes) > _SHAPES:  # rows of ever new weights or roles
                self._shapes.clear()
            shapes = self._shapes.setdefault(shape, [])
            shapes.insert(0, known)
            if self._by_shape(conversation, found.text, train_on) == found.spans:
                del shapes[_FRAMES:]
                return
            shapes.pop(0)

    def _assemble(
        self,
        conversation: Conversation,
        whole: str,
        parts: list[tuple[int, str, str]],
        train_on: str,
    ) -> list[Rendering]:
        if train_on == "all":
            if any(message.get("weight", 1.0) != 1.0 for message in conversation.messages):
                raise RowError(
                    conversation.place,
                    "a message has a weight, which needs data.train_on=responses or last.",
                )
            return [Rendering(conversation, whole, (Span(0, len(whole), 1.0),))]
        spans, alone = [], []
        for number, before, through in parts:
            span = self._span(conversation, number, before, through)
            spans.append(span)
            alone.append(Rendering(conversation.through(number), through, (span,), rewritten=True))
        numbers = [number for number, _, _ in parts]
        if all(
            whole[: span.end] == part.text[: span.end]
            for span, part in zip(spans, alone, strict=True)
        ):
            return [
                Rendering(
                    conversation,
                    whole,
                    tuple(self._marks(conversation, numbers) if self.marked else spans),
                )
            ]
        if self.marked:
            alone = [
                part._replace(spans=tuple(self._marks(part.conversation, [n])))
                for part, n in zip(alone, numbers, strict=True)
            ]
        return alone

    def _span(self, conversation: Conversation, number: int, before: str, through: str) -> Span:
        """The answer's words and the end-of-turn token after it in `through`."""
        message = conversation.messages[number]
        weight = message.get("weight", 1.0)
        where = f"messages[{number}]"
        if self.marked:
            return Span(0, _last_turn_end(through, self._ends), weight)
        if not through.startswith(before):
            raise RowError(
                conversation.place,
                f"the chat template renders {where} differently from the prompt that asks for it, "
                "so the answer's tokens cannot be told. Use data.train_on=all or another template.",
            )
        if message.keys() - {
            "role",
            "content",
            "weight",
            "name",
        }:  # reasoning, calls of tools: all the assistant says
            return Span(len(before), _last_turn_end(through, self._ends), weight)
        inner = self._inside_frame(before, through, message["content"])
        if inner is None:
            self._learn_frame(conversation, number, before)
            inner = self._inside_frame(before, through, message["content"])
        if inner is None:
            raise RowError(
                conversation.place,
                f"the chat template changes the text of {where}, so its tokens cannot be told.",
            )
        begin, end = inner
        ended = self._ends.match(through, end)
        return Span(begin, ended.end(1) if ended else end, weight)

    def _inside_frame(self, before: str, through: str, content: str) -> tuple[int, int] | None:
        for head, tail in self._frames:
            begin, end = len(before) + len(head), len(through) - len(tail)
            framed = (
                begin <= end and through.startswith(head, len(before)) and through.endswith(tail)
            )
            if framed and through[begin:end].strip() == content.strip():
                return begin, end
        return None

    def _learn_frame(self, conversation: Conversation, number: int, before: str) -> None:
        """What the template puts between the prompt and an answer, and behind the answer."""
        message = conversation.messages[number] | {"content": _PLACEHOLDER}
        probe = replace(conversation, messages=[*conversation.messages[:number], message])
        text = _text(self._one(probe, False))
        head, found, tail = text[len(before) :].partition(_PLACEHOLDER)
        if found and (head, tail) not in self._frames:
            self._frames = [(head, tail), *self._frames[: _FRAMES - 1]]

    def _marks(self, conversation: Conversation, numbers: list[int]) -> list[Span]:
        """Where the template itself says that the answers `numbers` are.

        Raises:
            RowError: the template marks another number of answers than there are, and not all train
                alike.

        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options = dict(conversation.options)
        tools = options.pop("tools", None)
        rendered: Any = render_jinja_template(
            [conversation.messages],
            tools=tools,
            chat_template=self.source(tools),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **options},
        )
        marks = rendered[1][0]
        answers = _answers(conversation, "responses", silent=True)
        weights = [conversation.messages[number].get("weight", 1.0) for number in numbers]
        if len(marks) == len(answers):
            marks = [marks[answers.index(number)] for number in numbers]
        elif numbers != answers or len(set(weights)) > 1:
            raise RowError(
                conversation.place,
                f"the chat template marks {len(marks)} answers, and the row has {len(answers)}.",
            )
        else:
            weights = weights[:1] * len(marks)
        return [
            Span(begin, end, weight) for (begin, end), weight in zip(marks, weights, strict=True)
        ]

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        """A special token, after white space; its group is the token."""
        added = (
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        )
        tokens = {*self.tokenizer.all_special_tokens, *added} - {""}
        longest_first = sorted(tokens, key=len, reverse=True)
        return re.compile(r"\s*(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def _apply(
        self, conversations: list[list[dict[str, Any]]], generate: bool, **options: Any
    ) -> list[str]:
        return self.tokenizer.apply_chat_template(
            conversations,
            chat_template=self.source(options.get("tools")),
            tokenize=False,
            add_generation_prompt=generate,
            **options,
        )

    def _one(self, conversation: Conversation, generate: bool) -> str | RowError:
        """One text, or why there is none: a template is its author's program and may fail in any
        way.
        """
        if not conversation.messages:
            return ""
        try:
            return self._apply([conversation.messages], generate, **conversation.options)[0]
        except Exception as error:
            reason = f"{error}".strip().split("\n")[0] or type(error).__name__
            return RowError(
                conversation.place, f"the chat template refuses this conversation: {reason}"
            )


def plain_template(tokenizer: Any) -> str:
    """The template for chats where the tokenizer brings none: a heading a message, EOS after
    each answer.
    """
    ids = tokenizer("")["input_ids"]
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id
    return PLAIN_TEMPLATE % ("bos_token" if begins else "''")


def _text(found: str | RowError) -> str:
    if isinstance(found, RowError):
        raise found
    return found


def _answers(conversation: Conversation, train_on: str, silent: bool = False) -> list[int]:
    """Numbers of the assistant's messages that are trained; with `silent` also those of weight
    0.
    """
    if train_on == "all":
        return []
    found = [
        number
        for number, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    found = found[-1:] if train_on == "last" else found
    return [
        number for number in found if silent or conversation.messages[number].get("weight", 1.0) > 0
    ]


def _shape(conversation: Conversation, train_on: str) -> tuple | None:
    """Roles and weights, which with the template's frame say what is trained; None where more
    than contents is rendered.
    """
    if conversation.options or train_on == "all":
        return None
    found: list[Any] = [train_on]
    for message in conversation.messages:
        if len(message) > 2 and message.keys() != {"role", "content", "weight"}:
            return None
        found += message["role"], message.get("weight", 1.0)
    return tuple(found)


def _before(conversation: Conversation, number: int) -> Conversation:
    return replace(conversation, messages=conversation.messages[:number])


def _last_turn_end(text: str, special: re.Pattern[str]) -> int:
    """The end of the first of the special tokens that `text` ends with; its end without white
    space where there is none.
    """
    found = re.search(rf"(?:{special.pattern})+\s*$", text)
    if found is None:
        return len(text.rstrip())
    first = special.match(text, found.start())
    return first.end(1) if first else len(text)
