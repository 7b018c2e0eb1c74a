"""`adapter_config.json` of PEFT: the one place where it is read, checked and written."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from jaxtune.adapters.config import (
    ALL_LINEAR,
    UNCHECKED,
    AdapterConfig,
    Expression,
    ModuleNames,
    PeftKey,
    names_from_peft,
    names_to_peft,
)
from jaxtune.adapters.method import AdapterMethod, all_methods, method_named
from jaxtune.adapters.tokens import TOKEN_ROWS
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import read_json
from jaxtune.weights.source import is_hub_id

# Keys that are read of every method, or that change nothing.
_COMMON_KEYS: dict[str, PeftKey] = {
    "target_modules": PeftKey(
        ModuleNames,
        f"a list of module names, a regular expression or '{ALL_LINEAR}'",
        required=True,
    ),
    "exclude_modules": PeftKey(
        Expression | list[str], "a list of module names or a regular expression"
    ),
    "modules_to_save": PeftKey(list[str], "a list of module names"),
    **dict.fromkeys(
        ("auto_mapping", "runtime_config", "base_model_name_or_path", "inference_mode",
         "task_type", "peft_type", "peft_version", "revision"),
        UNCHECKED,
    ),
}  # fmt: skip
_UNUSED = (None, False, 0, [], {})


def read_adapter_config(path: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Read an adapter's configuration and check each of its keys.

    Args:
        path: an `adapter_config.json`.

    Returns:
        What it says, and the file as it is.

    Raises:
        UserError: another kind of adapter, an option that is not implemented, or a value of
            another type or range; with the key.

    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold one JSON object, not {reprlib.repr(raw)}.")
    method = _method_of(raw, path)
    keys = _COMMON_KEYS | dict(method.peft_keys)
    keys |= TOKEN_ROWS.peft_keys if method.token_rows else {}
    unknown = [key for key, value in raw.items() if key not in keys and value not in _UNUSED]
    if unknown:
        raise UserError(f"{path}: options that jaxtune does not implement: {listed(unknown)}.")
    _check(raw, keys, path)
    fields = method.from_peft(raw, str(path))
    if method.token_rows:
        fields |= TOKEN_ROWS.from_peft(raw, str(path))
    config = method.config(
        targets=names_from_peft(raw["target_modules"]),
        excluded=names_from_peft(raw.get("exclude_modules")),
        saved=tuple(names_from_peft(raw.get("modules_to_save"))),
        **fields,
    )
    return config, raw


def _method_of(raw: dict[str, Any], path: Path) -> AdapterMethod[Any]:
    kind, methods = raw.get("peft_type"), all_methods().values()
    method = next((each for each in methods if each.peft_type == kind and each.reads(raw)), None)
    if method is None:
        kinds = dict.fromkeys(method.peft_type for method in methods)
        raise UserError(
            f"{path}: peft_type {reprlib.repr(kind)} is not supported; supported: {listed(kinds)}."
        )
    return method


def _check(raw: dict[str, Any], keys: Mapping[str, PeftKey], path: Path) -> None:
    """Check each key's type and range; null stands for a key that is not there."""
    for key, rule in keys.items():
        value = raw.get(key)
        if value is None and not rule.required:
            continue
        try:
            TypeAdapter(rule.type).validate_python(value, strict=True)
        except (ValidationError, OverflowError):
            raise UserError(
                f"{path}: {key} must be {rule.words}, not {reprlib.repr(value)}."
            ) from None


def adapter_config_json(config: AdapterConfig, base_name: str) -> dict[str, Any]:
    """Return what `adapter_config.json` holds of an adapter.

    Args:
        config: the adapter.
        base_name: what PEFT users load the base by.

    """
    method = method_named(config.method)
    name, _, revision = base_name.partition("@") if is_hub_id(base_name) else (base_name, "", "")
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        **({"revision": revision} if revision else {}),
        **method.to_peft(config),
        "target_modules": names_to_peft(config.targets),
        **({"exclude_modules": names_to_peft(config.excluded)} if config.excluded else {}),
        "modules_to_save": names_to_peft(config.saved),
        **(TOKEN_ROWS.to_peft(config) if method.token_rows else {}),
        "inference_mode": True,
    }
