"""Reading the values of a row: texts, messages, weights and what else a chat template takes.

Each function raises `RowError` where a value is missing or of the wrong type.
"""

import json
from typing import Any

from jaxtune.core.errors import listed, nearest
from jaxtune.data.sources.row import Row, RowError

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_required(row: Row, key: str) -> Any:
    """Return the value of a key that must be there."""
    if key not in row.value:
        raise RowError(
            row.location,
            f"the key '{key}' is missing; there are {listed(row.value)}.{nearest(key, row.value)}",
        )
    return row.value[key]


def read_text(row: Row, key: str) -> str:
    """Return the text of a key that must be there."""
    value = read_required(row, key)
    if not isinstance(value, str):
        raise RowError(row.location, f"'{key}' is of type {type(value).__name__}, not a string.")
    return value


def read_messages(row: Row, key: str) -> list[dict[str, Any]]:
    """Return the messages of a key as chat templates want them."""
    messages = read_required(row, key)
    if not isinstance(messages, list) or not messages:
        raise RowError(row.location, f"'{key}' is not a list with at least one message.")
    return [
        message
        if _is_simple(message)
        else _normalize_message(message, f"{row.location}: {key}[{number}]")
        for number, message in enumerate(messages)
    ]


def read_system(row: Row) -> list[dict[str, Any]]:
    """Return the message of the key `system`, as a list; empty where the row has none."""
    if not row.value.get("system"):
        return []
    return [{"role": "system", "content": read_text(row, "system")}]


def read_accepted(row: Row) -> tuple[str, ...]:
    """Return the texts of the key `answers`: all answers that are right, for evaluation."""
    answers = row.value.get("answers")
    if not (isinstance(answers, list) and all(isinstance(text, str) for text in answers)):
        return ()
    return tuple(answers)


def read_template_options(row: Row) -> dict[str, Any]:
    """Return the tools and further arguments of the chat template."""
    options: dict[str, Any] = {}
    tools = row.value.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RowError(row.location, "'tools' is not valid JSON.") from None
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RowError(row.location, "'tools' is not a list of objects.")
        options["tools"] = tools
    more = row.value.get("chat_template_kwargs")
    if more:
        if not isinstance(more, dict):
            raise RowError(row.location, "'chat_template_kwargs' is not an object.")
        options |= more
    return options


def check_weight(weight: Any, where: str) -> float:
    """Return a message's weight as a float.

    Args:
        weight: as the row has it.
        where: the place of the message, for the error.

    """
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight < float("inf")
    ):
        raise RowError(where, f"'weight' is {weight!r}, not a number from 0 on.")
    return float(weight)


def _is_simple(message: Any) -> bool:
    """Return whether a message is nothing but a role and a text, as most are."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(message.get("content")) is str
    )


def _normalize_message(message: Any, where: str) -> dict[str, Any]:
    """Return a message as chat templates want it: without nulls, its text in one string, the
    arguments of tool calls as objects.
    """
    if not isinstance(message, dict) or "role" not in message:
        raise RowError(where, "not an object with role and content.")
    if message["role"] not in ROLES:
        raise RowError(
            where,
            f"unknown role {message['role']!r}; roles are "
            f"{listed(ROLES)}.{nearest(str(message['role']), ROLES)}",
        )
    normalized = {key: value for key, value in message.items() if value is not None}
    if isinstance(normalized.get("content"), list):
        normalized["content"] = _join_parts(normalized["content"], where)
    if normalized.get("tool_calls"):
        if not isinstance(normalized["tool_calls"], list):
            raise RowError(where, "'tool_calls' is not a list.")
        normalized["tool_calls"] = [
            _normalize_tool_call(call, where) for call in normalized["tool_calls"]
        ]
        normalized.setdefault("content", "")
    if not isinstance(normalized.get("content"), str):
        raise RowError(where, "'content' is not a string.")
    if "weight" in normalized:
        normalized["weight"] = check_weight(normalized["weight"], where)
    return normalized


def _join_parts(parts: list[Any], where: str) -> str:
    """Join OpenAI's content parts; only text can be trained on."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(where, "'content' has parts that are not text.")
    return "".join(text for text in texts if text)


def _normalize_tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object: OpenAI writes them as JSON in a string,
    templates want the object.
    """
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
