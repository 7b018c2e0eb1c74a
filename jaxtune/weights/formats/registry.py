"""The formats by name.

A format is a module or folder beside this one with an instance of `format.Format` as `FORMAT`.
Code outside this package adds one by `register`. This module imports a format only when it is used,
so the command line can list the names at once.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jaxtune.core.errors import UserError, listed, nearest
from jaxtune.weights import formats

if TYPE_CHECKING:
    from jaxtune.weights.formats.format import Format, ModelFormat

# Known here because --help tells them apart without importing them.
ADAPTER_FORMATS = ("peft",)
_NOT_FORMATS = {"format", "registry"}
_loaded: dict[str, "Format"] = {}


def format_names() -> list[str]:
    """Return the names of all formats."""
    modules = {module.name for module in pkgutil.iter_modules(formats.__path__)}
    return sorted((modules - _NOT_FORMATS) | _loaded.keys())


def model_format_names() -> list[str]:
    """Return the names of the formats that hold a whole model."""
    return [name for name in format_names() if name not in ADAPTER_FORMATS]


def register(export_format: "Format") -> None:
    """Add a format under its name."""
    _loaded[export_format.name] = export_format


def get_format(name: str) -> "Format":
    """Return the format of this name.

    Raises:
        UserError: there is none.

    """
    if name not in _loaded:
        _check_name(name, format_names())
        loaded = importlib.import_module(f"{formats.__name__}.{name}").FORMAT
        assert (loaded.name, loaded.keeps_adapter) == (name, name in ADAPTER_FORMATS)
        register(loaded)
    return _loaded[name]


def get_model_format(name: str) -> "ModelFormat":
    """Return the format of this name, which holds a whole model.

    Raises:
        UserError: there is none, or it holds only an adapter.

    """
    _check_name(name, model_format_names())
    return cast("ModelFormat", get_format(name))


def find_format(path: Path) -> "ModelFormat":
    """Return the format that a directory or file is in.

    Raises:
        UserError: no format recognizes it.

    """
    candidates = [get_model_format(name) for name in model_format_names()]
    recognizing = [candidate for candidate in candidates if candidate.recognizes(path)]
    if not recognizing:
        known = listed((candidate.needs for candidate in candidates), len(candidates))
        raise UserError(
            f"{path} is not a model in a format that jaxtune reads. Give {known}, or a hub id "
            "(org/name)."
        )
    # A directory with config.json is Hugging Face's unless its weights are in another format.
    return min(recognizing, key=lambda candidate: candidate.is_fallback)


def _check_name(name: str, names: list[str]) -> None:
    if name not in names:
        raise UserError(
            f"The format {name!r} is not supported; supported are {listed(names, len(names))}."
            + nearest(name, names)
        )
