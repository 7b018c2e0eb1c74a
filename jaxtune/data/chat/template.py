"""Rendering conversations by the tokenizer's chat template."""

import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.chat.sandbox import TemplateCost, bounded
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
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"""strftime_now\((["'])(.*?)\1\)""")


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: whose special tokens the template may use.
        template: the template's text, or several by name, as tokenizers hold them.
        day: the date given to templates that print one; today's by default.

    """

    def __init__(self, tokenizer: Tokenizer, template: Any, day: date | None = None) -> None:
        self.tokenizer, self._template = tokenizer, template
        self._day = day

    @cached_property
    def marks_answers(self) -> bool:
        """Return whether the template marks the answers itself (`{% generation %}`)."""
        return bool(_GENERATION.search(self.source()))

    def source(self, tools: Any = None) -> str:
        """Return the template's text, the date filled in: a run that goes on tomorrow must see the
        same tokens.
        """
        day = self._day or date.today()
        template = (
            self._template
            if isinstance(self._template, str)
            else self.tokenizer.get_chat_template(tools=tools)
        )
        return _DATE.sub(lambda match: repr(day.strftime(match[2])), template)

    def render(self, requests: Sequence[tuple[Conversation, bool]]) -> list[str | RowError]:
        """Return the texts of conversations, errors in place of those the template refuses.

        Args:
            requests: conversations, each with whether the beginning of an answer is to follow.

        """
        if any(conversation.options for conversation, _ in requests):
            return [self.render_one(conversation, generate) for conversation, generate in requests]
        texts: list[str | RowError] = [""] * len(requests)
        for generate in (False, True):
            numbers = [
                number
                for number, (conversation, continued) in enumerate(requests)
                if continued == generate and conversation.messages
            ]
            if not numbers:
                continue
            try:
                rendered = self._apply(
                    [requests[number][0].messages for number in numbers], generate
                )
            except Exception:  # rendered singly, the row that fails is known
                rendered = [self.render_one(requests[number][0], generate) for number in numbers]
            for number, text in zip(numbers, rendered, strict=True):
                texts[number] = text
        return texts

    def render_one(self, conversation: Conversation, generate: bool) -> str | RowError:
        """Return the text of one conversation, or why there is none.

        A template is a program of its author's and may fail with any exception.

        Raises:
            UserError: it takes more time or memory than any conversation needs.

        """
        if not conversation.messages:
            return ""
        try:
            return self._apply([conversation.messages], generate, **conversation.options)[0]
        except TemplateCost as error:
            raise UserError(
                f"{conversation.location}: the chat template cannot be run: {error}. Use another "
                "model or template."
            ) from None
        except Exception as error:
            reason = f"{error}".strip().split("\n")[0] or type(error).__name__
            return RowError(
                conversation.location, f"the chat template refuses this conversation: {reason}"
            )

    def marked_ranges(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Return the ranges of characters that the template marks as answers."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = dict(conversation.options)
        tools = options.pop("tools", None)
        with bounded():
            rendered: Any = render_jinja_template(
                [conversation.messages],
                tools=tools,
                chat_template=self.source(tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **options},
            )
        return rendered[1][0]

    def _apply(
        self, conversations: list[list[dict[str, Any]]], generate: bool, **options: Any
    ) -> list[str]:
        with bounded():
            return self.tokenizer.apply_chat_template(
                conversations,
                chat_template=self.source(options.get("tools")),
                tokenize=False,
                add_generation_prompt=generate,
                **options,
            )


def template_of(tokenizer: Tokenizer, day: date | None = None) -> ChatTemplate:
    """Return the tokenizer's chat template, or the plain one where it has none."""
    return ChatTemplate(tokenizer, tokenizer.chat_template or plain_template(tokenizer), day)


def plain_template(tokenizer: Tokenizer) -> str:
    """Return the template for chats where the tokenizer has none: a heading a message, EOS after
    each answer.
    """
    ids = tokenizer("")["input_ids"]
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id
    return PLAIN_TEMPLATE % ("bos_token" if begins else "''")
