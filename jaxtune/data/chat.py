"""From a conversation to the tokens that are fed and the ones that are supervised.

Tokens are what the tokenizer's own chat template gives, here, in evaluation and in generation. The mask is made by position:
character spans of the answers are found by rendering the conversation up to each of them, and mapped to tokens by offsets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError
from jaxtune.data.formats import Conversation


@dataclass(frozen=True)
class Example:
    """A tokenised conversation.

    Attributes:
        ids: int32 token ids.
        supervised: for every token whether predicting it is trained.

    """

    ids: np.ndarray
    supervised: np.ndarray


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """The ids that generation starts from, the answer not begun.

    Raises:
        UserError: the tokenizer has no chat template and the row is a chat.

    """
    if tokenizer.chat_template:
        text = _render(tokenizer, conversation.prompt, conversation.place, generate=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if not conversation.plain:
        raise _no_template(conversation.place)
    return tokenizer(conversation.prompt[0]["content"])["input_ids"]


def tokenise(tokenizer: Any, conversation: Conversation, train_on: str) -> Example:
    """The example of a conversation.

    Args:
        tokenizer: a fast transformers tokenizer.
        conversation: the messages.
        train_on: `responses`, `last` (the last response only) or `all` tokens.

    Raises:
        UserError: the template fails, or renders an answer in a way that leaves unclear which tokens are the answer.

    """
    if tokenizer.chat_template:
        return _tokenise_chat(tokenizer, conversation, train_on)
    if not conversation.plain:
        raise _no_template(conversation.place)
    prompt = prompt_ids(tokenizer, conversation)
    answer = tokenizer(conversation.answer, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has neither a chat template nor an EOS token, so an answer could not be ended.")
    ids = np.asarray([*prompt, *answer, tokenizer.eos_token_id], np.int32)
    return Example(ids, np.arange(len(ids)) >= (0 if train_on == "all" else len(prompt)))


def _tokenise_chat(tokenizer: Any, conversation: Conversation, train_on: str) -> Example:
    text = _render(tokenizer, conversation.messages, conversation.place)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], np.int32)
    if train_on == "all":
        return Example(ids, np.ones(len(ids), bool))
    answers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    supervised = np.zeros(len(ids), bool)
    if answers:
        starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        for number in answers[-1:] if train_on == "last" else answers:
            begin, end = _answer_span(tokenizer, conversation, number, text)
            supervised |= (ends > begin) & (starts < end) & (ends > starts)
    return Example(ids, supervised)


def _answer_span(tokenizer: Any, conversation: Conversation, number: int, text: str) -> tuple[int, int]:
    """Characters of the answer's content and the end-of-turn token after it, in the rendered conversation."""
    messages, place = conversation.messages, conversation.place
    before = _render(tokenizer, messages[:number], place, generate=True)
    through = _render(tokenizer, messages[: number + 1], place)
    if not through.startswith(before):
        raise UserError(
            f"{place}: the chat template renders messages[{number}] differently from the prompt that asks for it, "
            "so the answer's tokens cannot be told. Use data.train_on=all or another template."
        )
    content = messages[number]["content"].strip()
    found = through.find(content, len(before))
    if found < 0:
        raise UserError(f"{place}: the chat template changes the text of messages[{number}], so its tokens cannot be told.")
    end = _end_of_turn(tokenizer, through, found + len(content))
    if text[:end] != through[:end]:
        raise UserError(
            f"{place}: the chat template renders messages[{number}] differently once other messages follow. "
            "Use data.train_on=last, or one row for every answer."
        )
    return found, end


def _end_of_turn(tokenizer: Any, text: str, start: int) -> int:
    """Where the first special token after `start` ends; `start` where none follows."""
    ends = []
    for token in _special_tokens(tokenizer):
        at = text.find(token, start)
        if at >= 0:
            ends.append((at, at + len(token)))
    return min(ends, key=lambda span: (span[0], -span[1]))[1] if ends else start


def _special_tokens(tokenizer: Any) -> set[str]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {*tokenizer.all_special_tokens, *added} - {""}


def _render(tokenizer: Any, messages: list[dict[str, Any]], place: str, *, generate: bool = False) -> str:
    """The text of the messages under the tokenizer's template, which transformers runs in a sandbox."""
    from jinja2.exceptions import TemplateError

    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise UserError(f"{place}: the chat template refuses this conversation: {error}") from None


def _no_template(place: str) -> UserError:
    return UserError(
        f"{place}: the row is a chat and the tokenizer has no chat template. "
        "Use an instruction-tuned model, or rows with prompt and completion, which need none."
    )
