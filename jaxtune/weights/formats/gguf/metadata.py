"""The metadata of a file's architecture: which keys are known, and what their values may be."""

import math
import re
from collections.abc import Iterable
from typing import Any

from jaxtune.core.errors import UserError, listed
from jaxtune.weights.formats.gguf.file import GGUF

_COUNTS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "rope.dimension_count", "vocab_size",
    "rope.scaling.original_context_length", "attention.sliding_window", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "attention.key_length_swa",
    "attention.value_length_swa", "rope.dimension_count_swa",
}  # fmt: skip
# Zero stands for "none" here.
_MAY_BE_ZERO = {"attention.sliding_window", "rope.scaling.original_context_length"}
_NUMBERS = {
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa",
    "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "embedding_scale",
    "residual_scale", "logit_scale",
}  # fmt: skip
# Keys of all families, beside the counts and numbers that a family adds.
_COMMON = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "vocab_size",
}  # fmt: skip
# Keys that change nothing as long as they have this value; another would change the model.
_FIXED: dict[str, Any] = {
    "attention.causal": True,
    "rope.scaling.yarn_ext_factor": 1.0,
    "expert_gating_func": 1,
    "expert_weights_norm": True,
}
# llama.cpp leaves out Granite's rotary embedding where this is false.
_FIXED_BY_ARCHITECTURE = {"granite.": {"rope.scaling.finetuned": True}}
# Keys that no part of the computation reads: labels, and what an embedding is pooled by.
_INERT = {"pooling_type", "rope.scaling.finetuned", "tensor_data_layout"}
# The same number a second time, for the layers with a window.
_SECOND = {
    "attention.key_length_swa": "attention.key_length",
    "attention.value_length_swa": "attention.value_length",
    "rope.dimension_count_swa": "rope.dimension_count",
    "attention.value_length": "attention.key_length",
}
_PATTERN = "attention.sliding_window_pattern"
_LARGEST = 1 << 31
_LAYER = re.compile(r"blk\.(\d+)\.")


def family_metadata(
    file: GGUF, family_keys: Iterable[str], required: Iterable[str], *, has_windows: bool
) -> dict[str, Any]:
    """Return the metadata of the file's architecture without its prefix, checked.

    Args:
        file: the file.
        family_keys: keys that the family has beyond those of all.
        required: keys that must be there.
        has_windows: whether some of the family's layers have a sliding window.

    Raises:
        UserError: a key is missing, unknown, or has a value that cannot be.

    """
    prefix = str(file.metadata["general.architecture"]) + "."
    metadata = {
        key.removeprefix(prefix): _single(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    family_keys, fixed = set(family_keys), _FIXED | _FIXED_BY_ARCHITECTURE.get(prefix, {})
    if has_windows:
        family_keys |= {_PATTERN, "rope.freq_base_swa"}
    known = _COMMON | family_keys | fixed.keys() | _INERT | _SECOND.keys()
    unknown = [key for key, value in metadata.items() if key not in known and value]
    unknown += [
        f"{key} = {metadata[key]!r}"
        for key, value in fixed.items()
        if key in metadata and metadata[key] != value
    ]
    if unknown:
        raise UserError(
            f"{file.path}: metadata that jaxtune does not understand: "
            f"{listed(prefix + text for text in unknown)}."
        )
    if missing := [prefix + key for key in required if key not in metadata]:
        raise UserError(f"{file.path}: the metadata {listed(missing)} is missing.")
    _check_values(file, prefix, metadata)
    if has_windows:
        _check_pattern(file, prefix, metadata)
    return metadata


def _single(value: Any) -> Any:
    """Return the number of a list that holds one for each layer, where all are the same."""
    if isinstance(value, list) and value and all(type(item) in (int, float) for item in value):
        return value[0] if value.count(value[0]) == len(value) else value
    return value


def _check_values(file: GGUF, prefix: str, metadata: dict[str, Any]) -> None:
    wrong = []
    for key, value in metadata.items():
        shown = f"{prefix}{key} = {str(value)[:40]}"
        if key in _COUNTS:
            least = 0 if key in _MAY_BE_ZERO else 1
            if type(value) is not int or not least <= value < _LARGEST:
                wrong.append(f"{shown} (not a positive whole number below 2^31)")
        elif key in _NUMBERS:
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                wrong.append(f"{shown} (not a number from 0 on)")
        elif key == "rope.scaling.type" and not isinstance(value, str):
            wrong.append(f"{shown} (not a text)")
    wrong += [
        f"{prefix}{key} = {metadata[key]} beside {prefix}{first} = {metadata[first]}"
        for key, first in _SECOND.items()
        if key in metadata and first in metadata and metadata[key] != metadata[first]
    ]
    if not wrong and not metadata.get("rope.freq_base", 1.0):
        wrong.append(f"{prefix}rope.freq_base = 0")
    if wrong:
        raise UserError(f"{file.path}: metadata that no model can have: {listed(wrong)}.")


def _check_pattern(file: GGUF, prefix: str, metadata: dict[str, Any]) -> None:
    """Check which layers have a window: every n-th not, or a list of one truth value a layer."""
    pattern = metadata.get(_PATTERN)
    is_list = isinstance(pattern, list) and len(pattern) == metadata["block_count"]
    if pattern is None or (is_list and all(type(item) is bool for item in pattern)):
        return
    if type(pattern) is not int or pattern < 1:
        raise UserError(
            f"{file.path}: {prefix}{_PATTERN} = {str(pattern)[:40]} is neither a positive "
            "whole number nor a truth value for each layer."
        )


def check_sizes(file: GGUF, metadata: dict[str, Any]) -> None:
    """Check the counts against the tensors, before anything is laid out by them.

    Raises:
        UserError: a count and a tensor differ.

    """
    prefix, shapes = str(file.metadata["general.architecture"]) + ".", file.tensors
    matches = filter(None, map(_LAYER.match, shapes))
    sizes = {"block_count": len({match[1] for match in matches})}
    if "token_embd.weight" in shapes:
        sizes["embedding_length"] = shapes["token_embd.weight"].shape[-1]
    if metadata.get("expert_count"):
        experts = [t.shape[0] for name, t in shapes.items() if name.endswith("_exps.weight")]
        sizes["expert_count"] = max(experts, default=0)
    if wrong := [
        f"{prefix}{key} = {metadata[key]}, and in the tensors it is {size}"
        for key, size in sizes.items()
        if metadata[key] != size
    ]:
        raise UserError(f"{file.path}: {listed(wrong)}.")
