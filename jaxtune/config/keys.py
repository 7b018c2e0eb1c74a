"""Dotted keys of a configuration: their names, their traits, and values by key."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxtune.config.schema import Config
from jaxtune.config.traits import Trait


def keys(model: type[BaseModel] = Config) -> list[str]:
    """Return all dotted leaf keys of a configuration."""
    return [key for key, _ in _fields(model)]


def keys_with(trait: Trait) -> set[str]:
    """Return the leaf keys of a run's configuration that have a trait."""
    return {key for key, fields in _fields(Config) if any(trait in f.metadata for f in fields)}


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of nested sections by dotted key.

    A mapping that is the value of one key, such as `optimizer.rates` or the range of a search,
    stays whole.
    """
    leaves = set(keys())

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            key = prefix + name
            if isinstance(value, dict) and key not in leaves and not value.keys() & {"low", "high"}:
                yield from walk(value, f"{key}.")
            else:
                yield key, value

    return dict(walk(tree, ""))


def nest(values: dict[str, Any], tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return nested sections with these values by dotted key; the inverse of `flatten`.

    Args:
        values: values by dotted key.
        tree: sections whose other keys stay; they are changed in place.

    """
    tree = {} if tree is None else tree
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def _fields(
    model: type[BaseModel], parents: tuple[FieldInfo, ...] = (), prefix: str = ""
) -> Iterator[tuple[str, tuple[FieldInfo, ...]]]:
    """Yield each leaf key with its field and the fields of the sections it lies in."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _fields(section, (*parents, field), f"{prefix}{name}.")
        else:
            yield prefix + name, (*parents, field)
