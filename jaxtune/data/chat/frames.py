"""The short way to the answers of a conversation: what a template puts around the contents of
conversations with the same roles is learned from one of them.
"""

from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

from jaxtune.data.chat.rendering import Rendering, Span, answer_numbers
from jaxtune.data.chat.template import ChatTemplate
from jaxtune.data.formats.conversation import Conversation

PLACEHOLDER = "\ue000\ue001\ue000"
"""Stands for a content whose place in a rendering is sought."""
MOST_FRAMES = 16
"""Frames kept of conversations with the same roles."""
_MOST_SIGNATURES = 4096


class _Frame(NamedTuple):
    """What a template puts around the contents of conversations with the same roles.

    Attributes:
        texts: the texts before, between and behind the contents.
        stripped: whether contents lose the white space around them.
        before, after: how many characters the supervised span begins after an answer's first and
            ends after its last.
        answers: numbers and weights of the messages that are trained.

    """

    texts: tuple[str, ...]
    stripped: bool
    before: int
    after: int
    answers: tuple[tuple[int, float], ...]


class FrameCache:
    """The frames learned so far.

    Args:
        template: what renders the conversations.
        train_on: see `rendering.answer_numbers`.

    """

    def __init__(self, template: ChatTemplate, train_on: str) -> None:
        self._template, self._train_on = template, train_on
        self._frames: dict[tuple, list[_Frame]] = {}

    def find_spans(self, conversation: Conversation, text: str) -> tuple[Span, ...] | None:
        """Return the answers of a conversation whose text is exactly a known frame with other
        contents; None where no known frame fits.
        """
        signature = self._signature(conversation)
        for frame in self._frames.get(signature, ()) if signature is not None else ():
            parts: list[str] = []
            for before, message in zip(frame.texts, conversation.messages, strict=False):
                content = message["content"]
                parts += before, content.strip() if frame.stripped else content
            if "".join((*parts, frame.texts[-1])) != text:
                continue
            ends = list(accumulate(map(len, parts)))
            return tuple(
                Span(ends[2 * number] + frame.before, ends[2 * number + 1] + frame.after, weight)
                for number, weight in frame.answers
            )
        return None

    def learn(self, conversation: Conversation, rendering: Rendering) -> None:
        """Keep the frame around the contents, so that the next conversation like this one needs
        a single rendering.

        Args:
            conversation: a conversation.
            rendering: its rendering, with its answers.

        """
        signature = self._signature(conversation)
        numbers = answer_numbers(conversation, self._train_on)
        if signature is None or len(numbers) != len(rendering.spans):
            return
        texts = self._texts_around_contents(conversation)
        if texts is None:
            return
        answers = tuple(
            (number, span.weight) for number, span in zip(numbers, rendering.spans, strict=True)
        )
        for stripped in (False, True):
            contents = [
                message["content"].strip() if stripped else message["content"]
                for message in conversation.messages
            ]
            ends = list(
                accumulate(
                    len(text) for pair in zip(texts[:-1], contents, strict=True) for text in pair
                )
            )
            offsets = {
                (span.begin - ends[2 * number], span.end - ends[2 * number + 1])
                for number, span in zip(numbers, rendering.spans, strict=True)
            }
            if len(offsets) > 1:
                continue
            before, after = offsets.pop() if offsets else (0, 0)
            if len(self._frames) > _MOST_SIGNATURES:  # rows of ever new weights or roles
                self._frames.clear()
            frames = self._frames.setdefault(signature, [])
            frames.insert(0, _Frame(texts, stripped, before, after, answers))
            if self.find_spans(conversation, rendering.text) == rendering.spans:
                del frames[MOST_FRAMES:]
                return
            frames.pop(0)

    def _texts_around_contents(self, conversation: Conversation) -> tuple[str, ...] | None:
        """Return what the template writes before, between and behind the contents; None where it
        leaves one out or changes their order.
        """
        marks = [
            f"{PLACEHOLDER}{number}{PLACEHOLDER}" for number in range(len(conversation.messages))
        ]
        messages = [
            message | {"content": mark}
            for message, mark in zip(conversation.messages, marks, strict=True)
        ]
        text = self._template.render_one(replace(conversation, messages=messages), False)
        texts, rest = [], text if isinstance(text, str) else ""
        for mark in marks:
            head, separator, rest = rest.partition(mark)
            if not separator:
                return None
            texts.append(head)
        return (*texts, rest)

    def _signature(self, conversation: Conversation) -> tuple | None:
        """Return roles and weights, which with the template's frame say what is trained; None where
        more than contents is rendered.
        """
        if conversation.options or self._train_on == "all":
            return None
        signature: list[Any] = []
        for message in conversation.messages:
            if len(message) > 2 and message.keys() != {"role", "content", "weight"}:
                return None
            signature += message["role"], message.get("weight", 1.0)
        return tuple(signature)
