"""From YAML and `key=value` overrides to a `Config`, with errors that name file, line, key and
the right name.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from jaxtune.config.schema import Config
from jaxtune.config.sweep import Sweep
from jaxtune.core.errors import UserError, nearest

Model = TypeVar("Model", bound=BaseModel)

COMMAND_LINE = "command line"
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


def load_config(
    path: Path | None = None, overrides: list[str] | None = None, values: dict | None = None
) -> Config:
    """The resolved configuration of a run.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: `section.key=value` strings; a value is read as YAML.
        values: nested keys that lie between the file and the overrides.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a value has the wrong type;
            with file, line and key.

    """
    tree, places = _read(path) if path else ({}, {})
    for key, value in _flatten(values or {}).items():
        _assign(tree, key, value)
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{COMMAND_LINE}: '{override}' is not of the form section.key=value.")
        try:
            _assign(tree, key.strip(), yaml.load(text, _Loader))
        except yaml.YAMLError:
            raise UserError(
                f"{COMMAND_LINE}: the value of {key} is not YAML: {text!r}. Quote it."
            ) from None
        places[key.strip()] = COMMAND_LINE
    return validated(tree, places, str(path) if path else COMMAND_LINE)


def validated(tree: dict, places: dict[str, str] | None = None, origin: str = "config") -> Config:
    """A `Config` from nested keys, pydantic's errors turned into one message.

    Args:
        tree: nested dictionaries.
        places: where each dotted key was written, for the message.
        origin: what to name where `places` does not know.

    """
    return _validated(Config, tree, places or {}, origin)


def load_sweep(path: Path) -> Sweep:
    """The description of a search.

    Raises:
        UserError: as `load_config` does.

    """
    tree, places = _read(path)
    parameters = tree.get("parameters")
    if isinstance(parameters, dict):
        tree["parameters"] = dict(_of_keys(parameters))
    return _validated(Sweep, tree, places, str(path))


def _of_keys(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, also where sections are nested; a mapping with low and high is a range."""
    for key, value in tree.items():
        if isinstance(value, dict) and not value.keys() & {"low", "high"}:
            yield from _of_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _validated(model: type[Model], tree: dict, places: dict[str, str], origin: str) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for item in sorted(
            error.errors(), key=lambda item: (-len(item["loc"]), item["type"] != "extra_forbidden")
        ):
            key, line = _explain(model, item, places, origin)
            lines.setdefault(
                key, line
            )  # the branches of a union each report; the one that got furthest is meant
        raise UserError("\n".join(lines.values())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> str:
    """The JSON schema of a configuration file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted leaf keys of the configuration."""
    found = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += keys(section, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _read(path: Path) -> tuple[dict, dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {error}.") from None
    try:
        node = yaml.compose(text, _Loader)
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}."
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


def _locate(node: yaml.Node, path: Path, prefix: str, places: dict[str, str]) -> None:
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


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def _assign(tree: dict, dotted: str, value: Any) -> None:
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
        return (
            key,
            f"{place}: unknown key '{key}{inner}'. {_expected(model, key).removeprefix('. ')}.",
        )
    if item["type"] == "extra_forbidden":
        sections = {name.split(".")[0] for name in known}
        candidates = known if "." in key else [*known, *sections]
        return key, f"{place}: unknown key '{key}'.{nearest(key, candidates)}"
    return (
        key,
        f"{place}: {key}{inner} = {item['input']!r}: {item['msg'].lower()}{_expected(model, key)}.",
    )


def _inner(parts: list[str]) -> str:
    """Positions and keys within a list, without the types that pydantic names between them."""
    kept = (
        part
        for part in parts
        if part.isdecimal() or (part.islower() and part.isidentifier() and part not in _TYPES)
    )
    return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in kept)


def _inside(key: str, known: list[str]) -> bool:
    """Whether `key` lies below a known leaf (pydantic appends union branches and list
    positions).
    """
    return any(key.startswith(name + ".") for name in known)


def _expected(root: type[BaseModel], key: str) -> str:
    model: Any = root
    for part in key.split("."):
        if (
            not (isinstance(model, type) and issubclass(model, BaseModel))
            or part not in model.model_fields
        ):
            return ""
        field = model.model_fields[part]
        model = field.annotation
    return f". {field.description.rstrip('.')}" if field.description else ""
