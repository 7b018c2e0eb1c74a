"""What a row says: a conversation or a text, whatever keys it is written with."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from jaxtune.core.errors import listed, nearest
from jaxtune.data.sources.row import Row, RowError, RowLocation

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGES, PROMPT_COMPLETION, CHOICE, ALPACA, SHAREGPT, TEXT, PREFERENCE = (
    "messages", "prompt-completion", "choice", "alpaca", "sharegpt", "text", "preference",
)  # fmt: skip
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "observation": "tool",
}  # fmt: skip
_QUESTION, _CHOSEN = ("prompt", "question"), ("answer", "answerKey", "label")
_FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Conversation:
    """A row's messages.

    Attributes:
        place: file and line, for messages.
        messages: dictionaries with role and content, as chat templates want them.
        plain: whether it was written as a prompt and its completion, and so needs no chat template.
        text: whether it is one text without roles, the content of its single message.
        options: what else the chat template is given: tools, and the row's `chat_template_kwargs`.
        label: what the answer is where answers are compared; see `objectives.objective`.
        choices: the answers that there were to choose from, where the row says them.
        accepted: other answers that are right too.

    """

    place: RowLocation | str
    messages: list[dict[str, Any]]
    plain: bool = False
    text: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    label: int = 0
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the last answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The last message where the assistant says it."""
        last = self.messages[-1]
        return last.get("content") or "" if last["role"] == "assistant" else None

    def digests(self) -> tuple[int, int, int]:
        """64-bit hashes of the whole, of the prompt (of the whole where there is none), and of
        the answer.
        """
        before, answer = blake2b(digest_size=8), blake2b(digest_size=8)
        for message in self.prompt:
            before.update(_canonical(message))
        whole = before.copy()
        if self.answer is not None:
            answer.update(_canonical(self.messages[-1]))
            whole.update(_canonical(self.messages[-1]))
        prompt = whole if len(self.prompt) == 0 else before
        row, asked, said = (
            int.from_bytes(found.digest(), "little") for found in (whole, prompt, answer)
        )
        return row, asked, said

    def through(self, number: int) -> "Conversation":
        """The conversation up to and with message `number`."""
        return replace(self, messages=self.messages[: number + 1])


def detect(value: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The format of a row by its keys, after `columns` are applied; None where there is none."""
    keys = value.keys() | columns.keys()
    if {"chosen", "rejected"} <= keys:
        return PREFERENCE
    if "choices" in keys and keys & set(_QUESTION) and not keys & {"completion", "messages"}:
        return CHOICE
    for wanted, kind in (
        ({"messages"}, MESSAGES), ({"conversations"}, SHAREGPT), ({"conversation"}, SHAREGPT), ({"prompt"}, PROMPT_COMPLETION),
        ({"instruction", "output"}, ALPACA), ({"text"}, TEXT),
    ):  # fmt: skip
        if wanted <= keys:
            return kind
    return None


def conversation(
    row: Row, kind: str = "auto", *, columns: Mapping[str, str] | None = None, answered: bool = True
) -> Conversation:
    """The conversation in a row.

    Args:
        row: the parsed row.
        kind: a format, or `auto` to go by the row's keys.
        columns: for keys of the format the column that has it, or a text with columns in braces.
        answered: whether a prompt needs a completion (training and evaluation do, generation does
            not).

    Raises:
        RowError: no known format, a key that is missing or of the wrong type, an unknown role; with
            file and line.

    """
    columns = columns or {}
    if kind == "auto":
        kind = detect(row.value, columns) or ""
    if not kind:
        raise RowError(
            row.place,
            f"none of the formats {listed(READERS)} among the keys {listed(row.value)}. "
            "Say which columns are what, for example data.columns={prompt: question, completion: "
            "answer}.",
        )
    if columns:
        row = Row(
            row.place,
            dict(row.value) | {key: _column(row, column) for key, column in columns.items()},
        )
    return READERS[kind](row, answered)


def _from_messages(row: Row, answered: bool) -> Conversation:
    return Conversation(
        row.place, _messages(row, "messages"), options=_options(row), accepted=_accepted(row)
    )


def _from_prompt(row: Row, answered: bool) -> Conversation:
    if isinstance(row.value.get("prompt"), list):
        found = _messages(row, "prompt") + (
            _messages(row, "completion") if answered or "completion" in row.value else []
        )
        return Conversation(row.place, found, options=_options(row), accepted=_accepted(row))
    texts = [_text(row, "prompt")]
    if answered or "completion" in row.value:
        texts.append(_text(row, "completion"))
    found = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), texts, strict=False)
    ]
    return Conversation(row.place, found, plain=True, accepted=_accepted(row))


def _accepted(row: Row) -> tuple[str, ...]:
    """The key answers: a list of answers that are right, for evaluation."""
    found = row.value.get("answers")
    if not (isinstance(found, list) and all(isinstance(text, str) for text in found)):
        return ()
    return tuple(found)


def _from_choice(row: Row, answered: bool) -> Conversation:
    """A question with choices: a list of texts, or lists of texts and of their labels, as ARC
    has them; the answer is an index, a label or a text.
    """
    question = _text(row, next((key for key in _QUESTION if key in row.value), "prompt"))
    choices, key = (
        row.value["choices"],
        next((key for key in _CHOSEN if key in row.value), "answer"),
    )
    texts, labels = (
        (choices.get("text"), choices.get("label"))
        if isinstance(choices, dict)
        else (choices, None)
    )
    if not (
        isinstance(texts, list)
        and len(texts) > 1
        and all(isinstance(text, str) and text for text in texts)
    ):
        raise RowError(row.place, "'choices' is not a list of at least two texts.")
    labels = (
        [str(label) for label in labels]
        if isinstance(labels, list)
        else [chr(ord("A") + n) for n in range(len(texts))]
    )
    asked, options = [{"role": "user", "content": question}], tuple(texts)
    if not answered and key not in row.value:
        return Conversation(row.place, asked, plain=True, choices=options)
    answer = _needed(row, key)
    number: int | None = answer if type(answer) is int else None
    for named in (texts, labels):
        number = named.index(str(answer)) if number is None and str(answer) in named else number
    if number is None or not 0 <= number < len(texts):
        raise RowError(
            row.place,
            f"'{key}' is {answer!r}, neither the number of a choice from 0, nor its label, nor "
            "its text.",
        )
    return Conversation(
        row.place,
        [*asked, {"role": "assistant", "content": texts[number]}],
        plain=True,
        choices=options,
    )


def _from_alpaca(row: Row, answered: bool) -> Conversation:
    """Stanford Alpaca's keys: the input stands below the instruction, separated by a blank line."""
    instruction, given = _text(row, "instruction"), row.value.get("input")
    if given:
        instruction = f"{instruction}\n\n{_text(row, 'input')}"
    found = [{"role": "system", "content": _text(row, "system")}] if row.value.get("system") else []
    history = row.value.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not (
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(text, str) for text in turn)
        ):
            raise RowError(row.place, "'history' is not a list of pairs of texts.")
        found += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    found.append({"role": "user", "content": instruction})
    if answered or "output" in row.value:
        found.append({"role": "assistant", "content": _text(row, "output")})
    return Conversation(row.place, found)


def _from_sharegpt(row: Row, answered: bool) -> Conversation:
    key = "conversations" if "conversations" in row.value else "conversation"
    turns = row.value.get(key)
    if (
        isinstance(turns, list)
        and turns
        and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    ):
        return Conversation(row.place, _messages(row, key), options=_options(row))
    if not isinstance(turns, list) or not turns:
        raise RowError(row.place, f"'{key}' is not a list with at least one turn.")
    found = [{"role": "system", "content": _text(row, "system")}] if row.value.get("system") else []
    for number, turn in enumerate(turns):
        where = f"{row.place}: {key}[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise RowError(where, "not an object with 'from' and a text as 'value'.")
        if not isinstance(turn.get("from"), str) or turn["from"] not in _SHAREGPT_ROLES:
            raise RowError(
                where,
                f"unknown speaker {turn.get('from')!r}; known are {listed(_SHAREGPT_ROLES, 20)}.",
            )
        message = {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        if turn.get("weight") is not None:
            message["weight"] = _weight(turn["weight"], where)
        found.append(message)
    return Conversation(row.place, found, options=_options(row))


def _from_text(row: Row, answered: bool) -> Conversation:
    return Conversation(
        row.place, [{"role": "assistant", "content": _text(row, "text")}], text=True
    )


def _from_preference(row: Row, answered: bool) -> Conversation:
    raise RowError(
        row.place,
        "a pair of preferences, which is for train.objective=dpo, simpo, orpo or kto. "
        "To train on the preferred answers: data.format=prompt-completion "
        "data.columns={completion: chosen}.",
    )


READERS = {
    MESSAGES: _from_messages, PROMPT_COMPLETION: _from_prompt, CHOICE: _from_choice,
    ALPACA: _from_alpaca, SHAREGPT: _from_sharegpt, TEXT: _from_text,
    PREFERENCE: _from_preference,
}  # fmt: skip
"""How each format is read."""


def preference(
    row: Row, columns: Mapping[str, str] | None = None
) -> tuple[Conversation, Conversation]:
    """`(chosen, rejected)`: two conversations with the same prompt.

    The answers are texts after `prompt`, or messages; where `prompt` is missing, they hold it as
    their common beginning.

    Raises:
        RowError: a key is missing or of the wrong type, or the two do not answer the same prompt.

    """
    value = dict(row.value) | {key: _column(row, column) for key, column in (columns or {}).items()}
    prompt = {"prompt": value["prompt"]} if value.get("prompt") is not None else {}
    pair = []
    for key in ("chosen", "rejected"):
        if key not in value:
            raise RowError(row.place, f"the key '{key}' is missing; there are {listed(value)}.")
        if isinstance(value[key], list) and not (prompt and isinstance(prompt["prompt"], list)):
            pair.append(_from_messages(Row(row.place, {"messages": value[key]}), True))
        else:
            pair.append(_from_prompt(Row(row.place, {**prompt, "completion": value[key]}), True))
    if pair[0].prompt != pair[1].prompt:
        raise RowError(row.place, "'chosen' and 'rejected' do not answer the same prompt.")
    return pair[0], pair[1]


def _column(row: Row, column: str) -> Any:
    """The value of a column, of a path such as answers.text.0, or of a text with columns in
    braces.
    """
    if column in row.value:
        return row.value[column]
    if not _FIELD.search(column):
        return _path(row, column)

    def filled(match: re.Match[str]) -> str:
        found = _path(row, match[1])
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _FIELD.sub(filled, column)


def _path(row: Row, path: str) -> Any:
    found: Any = row.value
    for step in [path] if path in row.value else path.split("."):
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            raise RowError(
                row.place,
                f"the column '{path}' of data.columns is missing; there are "
                f"{listed(row.value)}.{nearest(path, row.value)}",
            )
    return found


def _needed(row: Row, key: str) -> Any:
    if key not in row.value:
        raise RowError(
            row.place,
            f"the key '{key}' is missing; there are {listed(row.value)}.{nearest(key, row.value)}",
        )
    return row.value[key]


def _text(row: Row, key: str) -> str:
    value = _needed(row, key)
    if not isinstance(value, str):
        raise RowError(row.place, f"'{key}' is of type {type(value).__name__}, not a string.")
    return value


def _messages(row: Row, key: str) -> list[dict[str, Any]]:
    messages = _needed(row, key)
    if not isinstance(messages, list) or not messages:
        raise RowError(row.place, f"'{key}' is not a list with at least one message.")
    return [
        message if _is_simple(message) else _message(message, f"{row.place}: {key}[{number}]")
        for number, message in enumerate(messages)
    ]


def _is_simple(message: Any) -> bool:
    """Whether a message is nothing but a role and a text, as most are."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(message.get("content")) is str
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message as chat templates want it: without nulls, text in one piece, arguments of tools
    as objects.
    """
    if not isinstance(message, dict) or "role" not in message:
        raise RowError(where, "not an object with role and content.")
    if message["role"] not in ROLES:
        raise RowError(
            where,
            f"unknown role {message['role']!r}; roles are "
            f"{listed(ROLES)}.{nearest(str(message['role']), ROLES)}",
        )
    found = {key: value for key, value in message.items() if value is not None}
    if isinstance(found.get("content"), list):
        found["content"] = _joined(found["content"], where)
    if found.get("tool_calls"):
        if not isinstance(found["tool_calls"], list):
            raise RowError(where, "'tool_calls' is not a list.")
        found["tool_calls"] = [_tool_call(call, where) for call in found["tool_calls"]]
        found.setdefault("content", "")
    if not isinstance(found.get("content"), str):
        raise RowError(where, "'content' is not a string.")
    if "weight" in found:
        found["weight"] = _weight(found["weight"], where)
    return found


def _joined(parts: list[Any], where: str) -> str:
    """OpenAI's content parts; only text can be trained on."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(where, "'content' has parts that are not text.")
    return "".join(text for text in texts if text)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """OpenAI writes the arguments as JSON in a string; templates want the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(where, "a tool call without a function's name.")
    if isinstance(function.get("arguments"), str):
        try:
            function = function | {"arguments": json.loads(function["arguments"])}
        except (ValueError, RecursionError):
            raise RowError(
                where, f"the arguments of the tool call '{function['name']}' are not valid JSON."
            ) from None
    return {**call, "function": function} if "function" in call else function


def _options(row: Row) -> dict[str, Any]:
    """Tools and further arguments of the chat template."""
    found: dict[str, Any] = {}
    tools = row.value.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RowError(row.place, "'tools' is not valid JSON.") from None
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RowError(row.place, "'tools' is not a list of objects.")
        found["tools"] = tools
    more = row.value.get("chat_template_kwargs")
    if more:
        if not isinstance(more, dict):
            raise RowError(row.place, "'chat_template_kwargs' is not an object.")
        found |= more
    return found


def _weight(weight: Any, where: str) -> float:
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight < float("inf")
    ):
        raise RowError(where, f"'weight' is {weight!r}, not a number from 0 on.")
    return float(weight)


def _canonical(message: Mapping[str, Any]) -> bytes:
    """Bytes that two messages share only if they say the same."""
    if len(message) == 2 or message.keys() == {"role", "content", "weight"}:
        return f"{message['role']}\0{message['content']}\0".encode("utf-8", "surrogatepass")
    return json.dumps(message, sort_keys=True, default=str).encode() + b"\0"
