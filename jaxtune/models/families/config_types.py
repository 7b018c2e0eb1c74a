"""The types of the keys of `config.json`: a wrong one is found before anything is computed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtune.core.errors import UserError

_MOST = 2**31 - 1
_MOST_LAYERS = 10_000  # each is an object here; published models have about a hundred
_LARGEST = 3e38  # of float32


class _Kind(NamedTuple):
    """What a value must be, in words, and whether one is."""

    words: str
    accepts: Callable[[Any], bool]


def _whole(least: int, most: int = _MOST) -> _Kind:
    return _Kind(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # NaN is not


def _list_of(kind: _Kind) -> _Kind:
    return _Kind(
        f"a list, each {kind.words}",
        lambda value: isinstance(value, list) and all(map(kind.accepts, value)),
    )


_SIZE, _COUNT = _whole(1), _whole(0)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_NUMBER = _Kind("a finite number", _is_number)
_POSITIVE = _Kind("a positive finite number", lambda value: _is_number(value) and value > 0)
_SHARE = _Kind("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_EPSILON = _Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_LAYERS = _whole(1, _MOST_LAYERS)

_KEYS: dict[str, _Kind] = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "max_position_embeddings", "original_max_position_embeddings", "moe_intermediate_size",
            "decoder_sparse_step", "no_rope_layer_interval", "dim", "max_seq_len", "multiple_of",
        ),
        _SIZE,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), _LAYERS),
    **dict.fromkeys(("n_heads",), _SIZE),
    **dict.fromkeys(("num_experts", "num_local_experts"), _whole(0, _MOST_LAYERS)),
    **dict.fromkeys(
        (
            "num_key_value_heads", "head_dim", "sliding_window", "sliding_window_size",
            "sliding_window_pattern", "_sliding_window_pattern", "max_window_layers",
            "num_experts_per_tok", "n_kv_heads",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window",
            "norm_topk_prob", "output_router_logits", "use_scaled_rope",
        ),
        _FLAG,
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation", "model_type"), _TEXT),
    **dict.fromkeys(("rms_norm_eps", "norm_eps"), _EPSILON),
    **dict.fromkeys(
        (
            "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "logits_scaling",
            "final_logit_softcapping", "attn_logit_softcapping", "ffn_dim_multiplier",
            "rope_scaling_factor", "rope_high_freq_factor",
        ),
        _POSITIVE,
    ),
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(
        ("embedding_multiplier", "attention_multiplier", "residual_multiplier"), _NUMBER
    ),
    **dict.fromkeys(("architectures", "layer_types"), _list_of(_TEXT)),
    **dict.fromkeys(("no_rope_layers", "mlp_only_layers"), _list_of(_COUNT)),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), _OBJECT),
}  # fmt: skip

_ROPE_KEYS: dict[str, _Kind] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **dict.fromkeys(
        (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "attention_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("mscale", "mscale_all_dim"), _NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), _list_of(_POSITIVE)),
    "partial_rotary_factor": _SHARE,
    "truncate": _FLAG,
}


def check_config(raw: Any, where: str) -> None:
    """Check the types of a configuration's keys, `config.json`'s or `params.json`'s; null is as if
    the key were not there.

    Args:
        raw: the parsed file.
        where: the file, for messages.

    Raises:
        UserError: the file is no JSON object, or a value is none that the key can have.

    """
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not a JSON object. Write or download the file again.")
    _check(raw, _KEYS, where, "")


def check_rope(options: Mapping[str, Any], where: str, name: str) -> None:
    """Check the types of a rotary embedding's options, which stand under the key `name`.

    Raises:
        UserError: a value is none that the option can have.

    """
    _check(options, _ROPE_KEYS, where, f"{name}.")


def _check(values: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str, prefix: str) -> None:
    for key, value in values.items():
        kind = kinds.get(key)
        if kind is not None and value is not None and not kind.accepts(value):
            raise UserError(
                f"{where}: {prefix}{key} = {_shown(value)} must be {kind.words}. Correct it, or "
                "download the file again."
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
