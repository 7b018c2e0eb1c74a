"""The families of models: the fields of `ModelConfig` in which each differs from a plain Llama.

A family is an entry of `FAMILIES` and a function that reads these fields from its `config.json`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.models.config import ExpertsConfig, LayerConfig, NormConfig
from jaxtune.models.families.config_reader import (
    FULL,
    SLIDING,
    HFConfigReader,
    read_layer_types,
    read_rope,
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: the class of transformers that computes it.
        overrides: a function from its `config.json` to the fields of `ModelConfig` in which it
            differs from a plain Llama.
        defaults: what transformers assumes if `config.json` lacks a key, where it is not what it
            assumes for a plain Llama.
        renames: pairs of a part of a parameter's path and its name in files.

    """

    architecture: str
    overrides: Callable[[HFConfigReader], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()


def _typed_layers(
    read: HFConfigReader, window: int | None, otherwise: Callable[[int], str]
) -> tuple[LayerConfig, ...]:
    """Return the layers, with the window where their type is sliding attention."""
    return tuple(
        LayerConfig(window=window if kind == SLIDING else None)
        for kind in read_layer_types(read, otherwise)
    )


def _full_layers(read: HFConfigReader) -> tuple[LayerConfig, ...]:
    kinds = read_layer_types(read, lambda layer: FULL)
    if SLIDING in kinds:
        raise UserError(
            f"{read.where}: layer_types with {SLIDING} are not supported for {read('model_type')}."
        )
    return (LayerConfig(),) * len(kinds)


def _require_whole_rope(read: HFConfigReader) -> None:
    partial = read_rope(read).partial
    if partial != 1.0:
        raise UserError(
            f"{read.where}: partial_rotary_factor {partial} is not supported for "
            f"{read('model_type')}."
        )


def _attention_bias(read: HFConfigReader) -> dict[str, bool]:
    bias = read("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def _llama(read: HFConfigReader) -> dict[str, Any]:
    _require_whole_rope(read)
    return _attention_bias(read) | {"mlp_bias": read("mlp_bias"), "layers": _full_layers(read)}


def _windowed(read: HFConfigReader) -> dict[str, Any]:
    """Return what Mistral and Mixtral share: one window for all layers."""
    _require_whole_rope(read)
    window = read("sliding_window")
    read_layer_types(read, lambda layer: SLIDING)
    if window is None:
        return {"layers": _full_layers(read)}
    if FULL in (read("layer_types") or []):
        raise UserError(
            f"{read.where}: layer_types with {FULL} beside a sliding_window are not supported for "
            f"{read('model_type')}."
        )
    return {"layers": (LayerConfig(window=window),) * read("num_hidden_layers")}


def _mixtral(read: HFConfigReader) -> dict[str, Any]:
    read.require("output_router_logits", False)
    overrides = _windowed(read)
    experts = ExpertsConfig(
        read("num_local_experts"),
        read("num_experts_per_tok"),
        read("intermediate_size"),
        normalize=True,
    )
    return overrides | {
        "layers": tuple(replace(layer, sparse=True) for layer in overrides["layers"]),
        "experts": experts,
    }


def _window(read: HFConfigReader) -> int | None:
    """Return the window if it is used: a file may name one and switch it off."""
    window = read("sliding_window")
    return window if read("use_sliding_window") else None


def _qwen_layers(read: HFConfigReader) -> tuple[LayerConfig, ...]:
    window, first = _window(read), read("max_window_layers")
    return _typed_layers(
        read, window, lambda layer: SLIDING if window is not None and layer >= first else FULL
    )


def _qwen2(read: HFConfigReader) -> dict[str, Any]:
    _require_whole_rope(read)
    return {"qkv_bias": True, "layers": _qwen_layers(read)}


def _qwen3(read: HFConfigReader) -> dict[str, Any]:
    _require_whole_rope(read)
    return _attention_bias(read) | {"qk_norm": "head", "layers": _qwen_layers(read)}


def _qwen3_moe(read: HFConfigReader) -> dict[str, Any]:
    _require_whole_rope(read)
    read.require("output_router_logits", False)
    read("max_window_layers")  # transformers gives every layer the window, or none
    _full_layers(read)
    window, step = _window(read), read("decoder_sparse_step")
    # Two names for one number, of transformers 5 and 4; exports have both.
    count, old_count = read("num_local_experts"), read("num_experts")
    count = count or old_count
    dense = set(read("mlp_only_layers") or [])
    sparse = [
        count > 0 and layer not in dense and (layer + 1) % step == 0
        for layer in range(read("num_hidden_layers"))
    ]
    experts = ExpertsConfig(
        count,
        read("num_experts_per_tok"),
        read("moe_intermediate_size"),
        normalize=read("norm_topk_prob"),
    )
    layers = tuple(LayerConfig(window=window, sparse=is_sparse) for is_sparse in sparse)
    return _attention_bias(read) | {"qk_norm": "head", "layers": layers, "experts": experts}


def _gemma(read: HFConfigReader) -> dict[str, Any]:
    """Return what Gemma 2 and 3 share."""
    read.require("use_bidirectional_attention", False)
    read("hidden_act")  # an old name that transformers does not read for this family
    return _attention_bias(read) | {
        "norm": NormConfig(read("rms_norm_eps"), offset=1.0, wide=True),
        "norms": "sandwich",
        "activation": read("hidden_activation"),
        "embedding_scale": math.sqrt(read("hidden_size")),
        "attention_scale": read("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": read("final_logit_softcapping"),
    }


def _gemma2(read: HFConfigReader) -> dict[str, Any]:
    _require_whole_rope(read)
    window = read("sliding_window")
    read.require("sliding_window_size", window)  # an old second name
    layers = _typed_layers(read, window, lambda layer: FULL if layer % 2 else SLIDING)
    return _gemma(read) | {"layers": layers, "attention_softcap": read("attn_logit_softcapping")}


def _gemma3(read: HFConfigReader) -> dict[str, Any]:
    """Return the overrides of Gemma 3: local layers have a window and a RoPE of their own, global
    layers another RoPE, which may be stretched.
    """
    read.require("attn_logit_softcapping", None, " for gemma3_text, as in transformers")
    pattern, saved = read("sliding_window_pattern"), read("_sliding_window_pattern")
    pattern = pattern or saved  # transformers 4 writes both
    layers = _typed_layers(
        read, read("sliding_window"), lambda layer: SLIDING if (layer + 1) % pattern else FULL
    )
    nested, scaling = read("rope_parameters") or {}, read("rope_scaling") or {}
    if nested and not nested.keys() <= {SLIDING, FULL}:
        raise UserError(
            f"{read.where}: rope_parameters of gemma3_text must be given for {SLIDING} and {FULL}."
        )
    local_theta = read("rope_local_base_freq")
    global_rope = read_rope(read, {**scaling, **(nested.get(FULL) or {})})
    local_rope = read_rope(read, {"rope_theta": local_theta, **(nested.get(SLIDING) or {})})
    layers = tuple(replace(layer, rope=0 if layer.window is None else 1) for layer in layers)
    return _gemma(read) | {"qk_norm": "head", "ropes": (global_rope, local_rope), "layers": layers}


def _phi3(read: HFConfigReader) -> dict[str, Any]:
    rope = read_rope(read)
    read("original_max_position_embeddings")  # in every file of the family, used by longrope only
    if rope.kind not in ("default", "longrope", "yarn"):
        raise UserError(
            f"{read.where}: rope_type {rope.kind!r} is not supported for phi3; supported are "
            "default, longrope and yarn."
        )
    window = read("sliding_window")
    read_layer_types(read, lambda layer: FULL)
    layers = (LayerConfig(window=window),) * read("num_hidden_layers")
    return {"fused": True, "ropes": (rope,), "layers": layers}


def _olmo2(read: HFConfigReader) -> dict[str, Any]:
    _require_whole_rope(read)
    norm = NormConfig(read("rms_norm_eps"), wide=True)
    return _attention_bias(read) | {
        "norms": "post",
        "qk_norm": "full",
        "norm": norm,
        "layers": _full_layers(read),
    }


def _smollm3(read: HFConfigReader) -> dict[str, Any]:
    """Return the overrides of SmolLM3, some of whose layers have no rotary embedding (NoPE)."""
    _require_whole_rope(read)
    count, every = read("num_hidden_layers"), read("no_rope_layer_interval")
    rotary = read("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(count)]
    if len(rotary) < count:
        raise UserError(f"{read.where}: no_rope_layers names {len(rotary)} of the {count} layers.")
    window = _window(read)
    read("max_window_layers")  # of Qwen's configuration, which transformers does not read here
    layers = _typed_layers(
        read, window, lambda layer: SLIDING if window is not None and not rotary[layer] else FULL
    )
    layers = tuple(
        replace(layer, rope=0 if is_rotary else None)
        for layer, is_rotary in zip(layers, rotary, strict=False)
    )
    return _attention_bias(read) | {"mlp_bias": read("mlp_bias"), "layers": layers}


def _granite(read: HFConfigReader) -> dict[str, Any]:
    return _llama(read) | {
        "embedding_scale": read("embedding_multiplier"),
        "attention_scale": read("attention_multiplier"),
        "residual_scale": read("residual_multiplier"),
        "logit_scale": 1 / read("logits_scaling"),
    }


# What transformers assumes for a Llama, and for most others.
DEFAULTS = {
    "intermediate_size": 11008, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {
    "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_GEMMA = {
    "intermediate_size": 9216, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _windowed, _MISTRAL | {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _QWEN | {"head_dim": 128}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        _GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        _GEMMA
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "_sliding_window_pattern": 6,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _phi3,
        {
            "intermediate_size": 8192,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, {"rms_norm_eps": 1e-5}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _granite,
        {
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        _MISTRAL
        | {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        renames=(
            ("mlp.experts.gate_proj", "block_sparse_moe.experts.w1"),
            ("mlp.experts.up_proj", "block_sparse_moe.experts.w3"),
            ("mlp.experts.down_proj", "block_sparse_moe.experts.w2"),
            ("mlp.gate.", "block_sparse_moe.gate."),
        ),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        {
            "intermediate_size": 6144,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "norm_topk_prob": False,
        },
    ),
}
