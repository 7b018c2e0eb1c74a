"""From YAML and `key=value` overrides to a `Config`.

Errors name the file, the line, the key and the nearest valid name.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from jaxtune.config.keys import flatten, keys, nest
from jaxtune.config.schema import Config
from jaxtune.config.sweep import Sweep
from jaxtune.core.errors import UserError, first_line, nearest

Model = TypeVar("Model", bound=BaseModel)

COMMAND_LINE = "command line"
_MOST_BYTES, _MOST_NODES, _DEEPEST = 1 << 20, 20_000, 50
_LARGEST = 2**63 - 1
_TYPES = ("str", "int", "float", "bool", "none", "list", "dict")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2: 2e-4 is a number here, not a string."""


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Return the resolved configuration of a run.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: `section.key=value` strings; a value is read as YAML.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or a value has the wrong
            type; with file, line and key.

    """
    tree, places = _read(path) if path else ({}, {})
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{COMMAND_LINE}: '{override}' is not of the form section.key=value.")
        try:
            value = _parse(text, f"{COMMAND_LINE}: {key}")[1]
        except yaml.YAMLError:
            raise UserError(
                f"{COMMAND_LINE}: the value of {key} is not YAML: {text!r}. Quote it."
            ) from None
        _assign(tree, key.strip(), value)
        places[key.strip()] = COMMAND_LINE
    return validated(tree, places, str(path) if path else COMMAND_LINE)


def validated(tree: dict, places: dict[str, str] | None = None, origin: str = "config") -> Config:
    """Return a `Config` of nested keys, or raise pydantic's errors as one message.

    Args:
        tree: nested dictionaries.
        places: where each dotted key was written, for the message.
        origin: the name of the source of a key that `places` does not have.

    Raises:
        UserError: they are not a configuration.

    """
    return _validated(Config, tree, places or {}, origin)


def with_keys(config: Config, values: dict[str, Any], origin: str = "config") -> Config:
    """Return the configuration with other values of these dotted keys.

    Keys that were not set explicitly stay so (`model_fields_set`).

    Raises:
        UserError: the values do not make a configuration; the message begins with `origin`.

    """
    return validated(nest(values, config.model_dump(mode="json", exclude_unset=True)), {}, origin)


def load_sweep(path: Path) -> Sweep:
    """Return the description of a search.

    Raises:
        UserError: as `load_config` does.

    """
    tree, places = _read(path)
    parameters = tree.get("parameters")
    if isinstance(parameters, dict):
        tree["parameters"] = flatten(parameters)
    return _validated(Sweep, tree, places, str(path))


def _validated(model: type[Model], tree: dict, places: dict[str, str], origin: str) -> Model:
    _check_numbers(tree, places, origin)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines: dict[str, str] = {}
        # Every branch of a union reports an error: keep that of the branch which got furthest.
        for item in sorted(
            error.errors(), key=lambda item: (-len(item["loc"]), item["type"] != "extra_forbidden")
        ):
            key, line = _explain(model, item, places, origin)
            lines.setdefault(key, line)
        raise UserError("\n".join(lines.values())) from None


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> str:
    """Return the JSON schema of a configuration file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def _read(path: Path) -> tuple[dict, dict[str, str]]:
    """Return the nested keys of a YAML file, and where each dotted key is written."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {error}.") from None
    try:
        node, tree = _parse(text, str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or first_line(error)}."
        ) from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a configuration is a mapping of keys, not a {type(tree).__name__}."
        )
    places: dict[str, str] = {}
    _locate(node, path, "", places)
    return tree, places


def _parse(text: str, origin: str) -> tuple[yaml.Node | None, Any]:
    """Return the node and the value of a text in YAML.

    Raises:
        YAMLError: it is none.
        UserError: it is too large, too deep, or holds a number of thousands of digits.

    """
    if len(text) > _MOST_BYTES:
        raise UserError(f"{origin}: more than {_MOST_BYTES >> 20} MiB of YAML.")
    too_deep = UserError(
        f"{origin}: nested more than {_DEEPEST} deep, or with aliases that stand for more than "
        f"{_MOST_NODES:,} values. Write the values out."
    )
    try:
        node = yaml.compose(text, _Loader)
        if node is not None and _size(node, 0) > _MOST_NODES:
            raise too_deep
        return node, yaml.load(text, _Loader)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:  # an integer, or a date that there is not
        raise UserError(f"{origin}: {error}. Quote what is meant as a text.") from None


def _size(node: yaml.Node, depth: int) -> int:
    """Return how many values a node stands for with its aliases written out, or one more than may
    be.
    """
    if depth > _DEEPEST:
        raise RecursionError
    size = 1
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for part in item if isinstance(item, tuple) else (item,):
                size += _size(part, depth + 1)
                if size > _MOST_NODES:
                    return size
    return size


def _check_numbers(value: Any, places: dict[str, str], origin: str, key: str = "") -> None:
    """Refuse numbers that are none, or that no field can hold.

    Raises:
        UserError: with the key.

    """
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, places, origin, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_numbers(item, places, origin, key)
    elif not _is_usable(value):
        text = str(value)
        shown = text if len(text) < 30 else f"{text[:20]}..."
        raise UserError(
            f"{places.get(key, origin)}: {key} = {shown} is not a number that can be used."
        )


def _is_usable(value: Any) -> bool:
    """Return whether a value is a finite number of at most 64 bits, or no number."""
    if isinstance(value, int):
        return abs(value) <= _LARGEST
    return not isinstance(value, float) or math.isfinite(value)


def _locate(node: yaml.Node | None, path: Path, prefix: str, places: dict[str, str]) -> None:
    """Note where each key is written.

    Raises:
        UserError: a key is given twice.

    """
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _locate(value, path, f"{prefix.removesuffix('.')}[{number}].", places)
        return
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, place = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
        if name in places:
            raise UserError(
                f"{place}: {name} is given twice (first at {places[name]}). Remove one."
            )
        places[name] = place
        _locate(value, path, name + ".", places)


def _assign(tree: dict, dotted: str, value: Any) -> None:
    """Set a key of a nested tree; a mapping is merged into one that is there."""
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(tree.setdefault(parent, {}), dict):
            tree[parent] = {}
        tree = tree[parent]
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        value = tree[last] | value
    tree[last] = value


def _explain(
    model: type[BaseModel], item: Any, places: dict[str, str], origin: str
) -> tuple[str, str]:
    """Return the key that one of pydantic's errors is about, and a message."""
    parts = [str(part) for part in item["loc"]]
    known = keys(model)
    key = ".".join(parts)
    while parts and key not in known and _inside(key, known):
        parts.pop()
        key = ".".join(parts)
    place = next((places[name] for name in (key, key.rpartition(".")[0]) if name in places), origin)
    if item["type"] == "value_error":
        return key, f"{place}: {item['msg'].removeprefix('Value error, ')}."
    inner = _inner([str(part) for part in item["loc"]][len(parts) :])
    if item["type"] == "extra_forbidden" and inner:
        expected = _expected(model, key).removeprefix(". ")
        return key, f"{place}: unknown key '{key}{inner}'. {expected}."
    if item["type"] == "extra_forbidden":
        sections = {name.split(".")[0] for name in known}
        candidates = known if "." in key else [*known, *sections]
        return key, f"{place}: unknown key '{key}'.{nearest(key, candidates)}"
    reason = f"{item['msg'].lower()}{_expected(model, key)}"
    return key, f"{place}: {key}{inner} = {item['input']!r}: {reason}."


def _inner(parts: list[str]) -> str:
    """Return the positions and keys within a value, without the types that pydantic puts between
    them.
    """
    kept = (
        part
        for part in parts
        if part.isdecimal() or (part.islower() and part.isidentifier() and part not in _TYPES)
    )
    return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in kept)


def _inside(key: str, known: list[str]) -> bool:
    """Return whether `key` lies below a known leaf: pydantic appends union branches and list
    positions.
    """
    return any(key.startswith(name + ".") for name in known)


def _expected(root: type[BaseModel], key: str) -> str:
    """Return the description of a key as the end of a message."""
    section: Any = root
    description = None
    for part in key.split("."):
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            return ""
        description, section = fields[part].description, fields[part].annotation
    return f". {' '.join(description.split()).rstrip('.')}" if description else ""
