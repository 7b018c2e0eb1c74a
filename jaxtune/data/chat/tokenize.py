"""From conversations to the tokens that are fed and the ones that are supervised.

Tokens are what the tokenizer's own chat template gives, here, in evaluation and in generation. The
mask is made by position: the characters of the answers are known from the rendering, and mapped to
tokens by the tokenizer's own offsets.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.chat.answers import AnswerLocator
from jaxtune.data.chat.rendering import Rendering, Span, require_text
from jaxtune.data.chat.template import template_of
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.sources.readers import is_text
from jaxtune.data.sources.row import RowError

_NEAR_END = 4


@dataclass(frozen=True)
class Example:
    """Tokens of a row.

    Attributes:
        ids: int32 token ids.
        weights: for every token how much predicting it counts; 0 where it is not supervised.

    """

    ids: np.ndarray
    weights: np.ndarray

    @property
    def supervised(self) -> np.ndarray:
        """Return for every token whether predicting it is trained."""
        return self.weights > 0


class Document(NamedTuple):
    """A tokenized row, or one answer's part of it, not truncated.

    Attributes:
        conversation: what it says.
        ids: int32 token ids.
        spans: token ranges that are supervised, disjoint and in order, with their weights.
        rewritten: see `rendering.Rendering`.

    """

    conversation: Conversation
    ids: np.ndarray
    spans: tuple[Span, ...]
    rewritten: bool = False

    def example(self) -> Example:
        """Return its tokens with a weight each."""
        weights = np.zeros(len(self.ids), np.float32)
        for span in self.spans:
            weights[span.begin : span.end] = span.weight
        return Example(self.ids, weights)


class ConversationTokenizer:
    """Tokenizes rows for training, many at a time.

    Args:
        tokenizer: a fast transformers tokenizer.
        train_on: `responses`, `last` (the last response only) or `all` tokens. Of a text all tokens
            are trained.
        day: the date for templates that print one; today's by default.

    """

    def __init__(self, tokenizer: Tokenizer, train_on: str, day: date | None = None) -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        self._answers = AnswerLocator(template_of(tokenizer, day), train_on)
        self._has_template = bool(tokenizer.chat_template)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, conversations: Sequence[Conversation]) -> list[list[Document] | RowError]:
        """Return the documents of each conversation; bad ones as errors."""
        return self.encode(self.render(conversations))

    def render(self, conversations: Sequence[Conversation]) -> list[list[Rendering] | RowError]:
        """Return the texts to encode; the bare conversation where no template is used."""
        renderings: list[list[Rendering] | RowError] = [[] for _ in conversations]
        chats = []
        for number, conversation in enumerate(conversations):
            if not all(is_text(message["content"]) for message in conversation.messages):
                renderings[number] = RowError(
                    conversation.location,
                    "a text has half of a surrogate pair, which is no character.",
                )
            elif self._uses_template(conversation):
                chats.append(number)
            elif not self._has_template and self._eos is None:
                renderings[number] = RowError(
                    conversation.location,
                    "the tokenizer has neither a chat template nor an EOS token, so an answer "
                    "could not be ended.",
                )
            else:
                renderings[number] = [Rendering(conversation, "", ())]
        located = self._answers.locate([conversations[number] for number in chats])
        for number, rendering in zip(chats, located, strict=True):
            renderings[number] = rendering
        return renderings

    def encode(
        self, rendered: Sequence[list[Rendering] | RowError]
    ) -> list[list[Document] | RowError]:
        """Return the tokens of what was rendered. Runs without Python's lock for most of its
        time.
        """
        flat = [part for parts in rendered if not isinstance(parts, RowError) for part in parts]
        documents = iter(self._encode_documents(flat))
        return [
            parts if isinstance(parts, RowError) else [next(documents) for _ in parts]
            for parts in rendered
        ]

    def _encode_documents(self, parts: list[Rendering]) -> list[Document]:
        documents: list[Document | None] = [None] * len(parts)
        chats, plain = [], []
        for number, part in enumerate(parts):
            (chats if self._uses_template(part.conversation) else plain).append(number)
        encodings = self._encode_texts([parts[n].text for n in chats], add_special_tokens=False)
        for number, encoding in zip(chats, encodings, strict=True):
            part = parts[number]
            spans = tuple(_token_span(encoding, span, len(part.text)) for span in part.spans)
            documents[number] = Document(
                part.conversation, _int32(encoding.ids), spans, part.rewritten
            )
        conversations = [parts[number].conversation for number in plain]
        prompts = self._encode_texts(list(map(_opening, conversations)), add_special_tokens=True)
        answers = self._encode_texts(
            list(map(_completion, conversations)), add_special_tokens=False
        )
        for number, prompt, answer in zip(plain, prompts, answers, strict=True):
            documents[number] = self._plain_document(
                parts[number].conversation, prompt.ids, answer.ids
            )
        return [document for document in documents if document is not None]

    def _plain_document(
        self, conversation: Conversation, prompt: list[int], answer: list[int]
    ) -> Document:
        """Return prompt, completion and EOS. Generation begins the same way, with the prompt's own
        tokens.
        """
        ids = _int32([*prompt, *answer])
        if (
            self._eos is not None
            and (len(ids) == 0 or ids[-1] != self._eos)
            and conversation.answer is not None
        ):
            ids = np.append(ids, np.int32(self._eos))
        begin = 0 if conversation.text or self.train_on == "all" else len(prompt)
        spans = (Span(begin, len(ids), 1.0),) if begin < len(ids) else ()
        return Document(conversation, ids, spans)

    def _encode_texts(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        if not texts:
            return []
        return self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)

    def _uses_template(self, conversation: Conversation) -> bool:
        return not conversation.text and (self._has_template or not conversation.plain)

    @cached_property
    def _eos(self) -> int | None:
        return self.tokenizer.eos_token_id


def prompt_ids(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Return the ids that generation starts from, the answer not begun; of a text, those of the
    text.

    Raises:
        RowError: the chat template refuses the conversation.

    """
    if conversation.text or (conversation.plain and not tokenizer.chat_template):
        return tokenizer(_opening(conversation))["input_ids"]
    prompt = Conversation(conversation.location, conversation.prompt, options=conversation.options)
    text = require_text(template_of(tokenizer).render_one(prompt, True))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _int32(ids: list[int]) -> np.ndarray:
    # Twice as fast as np.array, which looks at every number's type.
    return np.frombuffer(array("i", ids), np.int32)


def _opening(conversation: Conversation) -> str:
    """Return what a row without template begins with: the prompt, or of a text the whole."""
    return conversation.messages[0]["content"]


def _completion(conversation: Conversation) -> str:
    """Return what follows the opening; nothing where it is the whole."""
    return "" if conversation.text else conversation.answer or ""


def _token_span(encoding: Any, span: Span, length: int) -> Span:
    """Return the tokens that overlap a span of characters."""
    return Span(
        _token_at(encoding, span.begin, length), _end_token(encoding, span.end, length), span.weight
    )


def _end_token(encoding: Any, char: int, length: int) -> int:
    """Return the first token that begins at or after `char`. An answer's end is sought from the
    end of the row, where it mostly is.
    """
    end = len(encoding)
    for token in range(end - 1, max(end - _NEAR_END, -1), -1):
        begin, stop = encoding.token_to_chars(token) or (0, 0)
        if begin < char and stop:
            return token + 1
    token = _token_at(encoding, char, length)
    return token + 1 if token < end and encoding.token_to_chars(token)[0] < char else token


def _token_at(encoding: Any, char: int, length: int) -> int:
    """Return the first token that has `char` or, where no token has it, the next character that
    one has.
    """
    while char < length:
        token = encoding.char_to_token(char)
        if token is not None:
            return token
        char += 1
    return len(encoding)
