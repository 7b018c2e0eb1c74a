"""`config.json` for transformers 4 and 5 alike.

transformers 5 writes the rotary embedding as `rope_parameters`, and reads the keys of 4 too; 4
takes its own default, without a word, where `rope_theta` is missing.
"""

from collections.abc import Mapping
from typing import Any

from jaxtune.models.families.config_reader import FULL, SLIDING

_NESTED = (FULL, SLIDING)


def in_both_dialects(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a `config.json` with the keys of transformers 4 beside those of 5.

    Args:
        raw: in either dialect.
        dtype: of the weights.

    """
    both = {**raw, "dtype": dtype, "torch_dtype": dtype}
    if raw.get("model_type") == "qwen3_moe" and "num_local_experts" in raw:
        both.setdefault("num_experts", raw["num_local_experts"])
    rope = raw.get("rope_parameters")
    if not rope:
        return both
    if any(isinstance(rope.get(kind), dict) for kind in _NESTED):
        whole, local = (dict(rope.get(kind) or {}) for kind in _NESTED)
        if "rope_theta" in local:
            both.setdefault("rope_local_base_freq", local["rope_theta"])
    else:
        whole = dict(rope)
    theta, partial = whole.pop("rope_theta", None), whole.pop("partial_rotary_factor", None)
    if theta is not None:
        both.setdefault("rope_theta", theta)
    if partial not in (None, 1.0):
        both.setdefault("partial_rotary_factor", partial)
    both.setdefault("rope_scaling", _scaling(whole, both))
    return both


def _scaling(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling`; what 4 reads beside it is set in `config`."""
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    length = rope.get("original_max_position_embeddings")
    if kind == "default":
        return None
    if kind == "longrope" and length is not None and "factor" not in rope:
        config.setdefault("original_max_position_embeddings", length)
        rope.pop("original_max_position_embeddings")
    # 4 knows Phi 3's kind by this name alone.
    return {"type" if config.get("model_type") == "phi3" else "rope_type": kind, **rope}
