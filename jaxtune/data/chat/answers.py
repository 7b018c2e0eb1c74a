"""The characters of a rendering that are answers.

Where the template marks them (`{% generation %}`), they are where it says. Elsewhere they are found
by position: the prompt that asks for an answer is rendered, and the conversation through that
answer; what the second has beyond the first is the answer in the template's frame, and the frame is
known from rendering a placeholder in its place. Nothing is searched for by its text.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.chat.frames import MOST_FRAMES, PLACEHOLDER, FrameCache
from jaxtune.data.chat.rendering import (
    Rendering,
    Span,
    answer_numbers,
    assistant_numbers,
    require_text,
    weight_of,
)
from jaxtune.data.chat.template import ChatTemplate, template_of
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.sources.row import RowError


class _Answer(NamedTuple):
    """An answer's message number, the text of the prompt that asks for it, and the text through
    it.
    """

    number: int
    before: str
    through: str


class AnswerLocator:
    """Renders conversations and locates their answers.

    Args:
        template: what renders them.
        train_on: which answers are trained; see `rendering.answer_numbers`.

    """

    def __init__(self, template: ChatTemplate, train_on: str) -> None:
        self._template, self._train_on = template, train_on
        self._cache = FrameCache(template, train_on)
        self._answer_frames: list[tuple[str, str]] = []

    def locate(self, conversations: Sequence[Conversation]) -> list[list[Rendering] | RowError]:
        """Return the renderings of each conversation with their answers: one for most, one an
        answer where the template rewrites earlier turns; bad ones as errors.
        """
        texts = self._template.render([(conversation, False) for conversation in conversations])
        renderings: list[list[Rendering] | RowError] = []
        unknown = []
        for number, (conversation, text) in enumerate(zip(conversations, texts, strict=True)):
            if isinstance(text, RowError):
                renderings.append(text)
                continue
            spans = self._cache.find_spans(conversation, text)
            renderings.append([Rendering(conversation, text, spans or ())])
            if spans is None:
                unknown.append(number)
        for number in unknown:
            conversation, text = conversations[number], require_text(texts[number])
            try:
                # One before it may have taught the frame by now.
                spans = self._cache.find_spans(conversation, text)
                renderings[number] = (
                    [Rendering(conversation, text, spans)]
                    if spans
                    else self._compare_renderings(conversation, text)
                )
            except RowError as error:
                renderings[number] = error
        return renderings

    def _compare_renderings(self, conversation: Conversation, whole: str) -> list[Rendering]:
        """Locate the answers of a conversation by comparing each with the prompt that asks for it
        and with what follows it.
        """
        if self._train_on == "all":
            return [self._render_all(conversation, whole)]
        numbers = answer_numbers(conversation, self._train_on)
        requests: list[tuple[Conversation, bool]] = []
        for number in numbers:
            requests.append((conversation.before(number), True))
            requests.append((conversation.through(number), False))
        texts = [require_text(text) for text in self._template.render(requests)]
        answers = list(map(_Answer, numbers, texts[::2], texts[1::2]))
        renderings = self._assemble(conversation, whole, answers)
        if len(renderings) == 1 and not renderings[0].rewritten:
            self._cache.learn(conversation, renderings[0])
        return renderings

    def _render_all(self, conversation: Conversation, whole: str) -> Rendering:
        if any(message.get("weight", 1.0) != 1.0 for message in conversation.messages):
            raise RowError(
                conversation.location,
                "a message has a weight, which needs data.train_on=responses or last.",
            )
        return Rendering(conversation, whole, (Span(0, len(whole), 1.0),))

    def _assemble(
        self, conversation: Conversation, whole: str, answers: list[_Answer]
    ) -> list[Rendering]:
        """Return one rendering with all answers, or one for each where the whole differs from the
        text through an answer.
        """
        numbers = [answer.number for answer in answers]
        spans = [self._span(conversation, answer) for answer in answers]
        if all(
            whole[: span.end] == answer.through[: span.end]
            for span, answer in zip(spans, answers, strict=True)
        ):
            if self._template.marks_answers:
                spans = self._marked_spans(conversation, numbers)
            return [Rendering(conversation, whole, tuple(spans))]
        separate = []
        for answer, span in zip(answers, spans, strict=True):
            part = conversation.through(answer.number)
            own = (
                self._marked_spans(part, [answer.number])
                if self._template.marks_answers
                else [span]
            )
            separate.append(Rendering(part, answer.through, tuple(own), rewritten=True))
        return separate

    def _span(self, conversation: Conversation, answer: _Answer) -> Span:
        """Return the answer's words and the end-of-turn token after it, in the text through it."""
        number, before, through = answer
        message, weight = conversation.messages[number], weight_of(conversation, number)
        where = f"messages[{number}]"
        if self._template.marks_answers:
            return Span(0, self._last_turn_end(through), weight)
        if not through.startswith(before):
            raise RowError(
                conversation.location,
                f"the chat template renders {where} differently from the prompt that asks for it, "
                "so the answer's tokens cannot be told. Use data.train_on=all or another template.",
            )
        if message.keys() - {"role", "content", "weight", "name"}:
            # Reasoning and tool calls: all of it is what the assistant says.
            return Span(len(before), self._last_turn_end(through), weight)
        inside = self._inside_frame(before, through, message["content"])
        if inside is None:
            self._learn_answer_frame(conversation, number, before)
            inside = self._inside_frame(before, through, message["content"])
        if inside is None:
            raise RowError(
                conversation.location,
                f"the chat template changes the text of {where}, so its tokens cannot be told.",
            )
        begin, end = inside
        end_of_turn = self._end_of_turn.match(through, end)
        return Span(begin, end_of_turn.end(1) if end_of_turn else end, weight)

    def _inside_frame(self, before: str, through: str, content: str) -> tuple[int, int] | None:
        for head, tail in self._answer_frames:
            begin, end = len(before) + len(head), len(through) - len(tail)
            framed = (
                begin <= end and through.startswith(head, len(before)) and through.endswith(tail)
            )
            if framed and through[begin:end].strip() == content.strip():
                return begin, end
        return None

    def _learn_answer_frame(self, conversation: Conversation, number: int, before: str) -> None:
        """Learn what the template puts between the prompt and an answer, and behind the answer."""
        message = conversation.messages[number] | {"content": PLACEHOLDER}
        probe = replace(conversation, messages=[*conversation.messages[:number], message])
        text = require_text(self._template.render_one(probe, False))
        head, placeholder, tail = text[len(before) :].partition(PLACEHOLDER)
        if placeholder and (head, tail) not in self._answer_frames:
            self._answer_frames = [(head, tail), *self._answer_frames[: MOST_FRAMES - 1]]

    def _marked_spans(self, conversation: Conversation, numbers: list[int]) -> list[Span]:
        """Return where the template itself says that the answers `numbers` are.

        Raises:
            RowError: the template marks another number of answers than there are, and not all have
                the same weight.

        """
        ranges = self._template.marked_ranges(conversation)
        answers = assistant_numbers(conversation)
        weights = [weight_of(conversation, number) for number in numbers]
        if len(ranges) == len(answers):
            ranges = [ranges[answers.index(number)] for number in numbers]
        elif numbers != answers or len(set(weights)) > 1:
            raise RowError(
                conversation.location,
                f"the chat template marks {len(ranges)} answers, and the row has {len(answers)}.",
            )
        else:
            weights = weights[:1] * len(ranges)
        return [
            Span(begin, end, weight) for (begin, end), weight in zip(ranges, weights, strict=True)
        ]

    def _last_turn_end(self, text: str) -> int:
        """Return the end of the first of the special tokens that `text` ends with; its end without
        white space where there is none.
        """
        tail = re.search(rf"(?:{self._end_of_turn.pattern})+\s*$", text)
        if tail is None:
            return len(text.rstrip())
        first = self._end_of_turn.match(text, tail.start())
        return first.end(1) if first else len(text)

    @cached_property
    def _end_of_turn(self) -> re.Pattern[str]:
        return _end_of_turn(self._template.tokenizer)


def _end_of_turn(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of white space and a special token; its group is the token."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added} - {""}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(r"\s*(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def end_of_answer(tokenizer: Tokenizer) -> int | None:
    """Return the token that follows an answer: the one that the chat template puts behind it, EOS
    without a template. None where there is none.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    messages = [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": PLACEHOLDER},
    ]
    text = template_of(tokenizer).render_one(Conversation("a probe", messages), False)
    if isinstance(text, RowError):
        return None
    end = _end_of_turn(tokenizer).match(text.rpartition(PLACEHOLDER)[2])
    return None if end is None else tokenizer.convert_tokens_to_ids([end[1]])[0]
