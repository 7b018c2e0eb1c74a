"""`generation_config.json`: the tokens at which a model's answers end, beside its weights or beside
an adapter.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json, write_json

GENERATION_CONFIG = "generation_config.json"
_MOST = 2**31 - 1


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Return the file in a directory; empty where there is none.

    Raises:
        UserError: it is no JSON object, or what it names as tokens are no token ids.

    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return {}
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object. Download it again, or remove it.")
    token_ids(raw, "eos_token_id", str(path))
    return raw


def write_generation_config(
    directory: Path, raw: Mapping[str, Any], stop_ids: Iterable[int]
) -> None:
    """Write the file with these stop tokens: one as a number, several as a list, as transformers
    does. Without anything to say no file is written.
    """
    ids, content = sorted(set(stop_ids)), dict(raw)
    if ids and ids != token_ids(raw, "eos_token_id", GENERATION_CONFIG):
        content["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    if content:
        write_json(directory / GENERATION_CONFIG, content)


def token_ids(raw: Mapping[str, Any], key: str, where: str) -> list[int]:
    """Return the token ids that a key names, in order: none (null), one or a list of them.

    Args:
        raw: a configuration.
        key: such as eos_token_id.
        where: its file, for messages.

    Raises:
        UserError: the value is something else.

    """
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _MOST:
            raise UserError(
                f"{where}: {key} = {value!r:.80} is neither a token id nor a list of token ids. "
                "Correct it or remove it."
            )
    return sorted(set(ids))
