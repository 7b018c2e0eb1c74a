"""The families of models: in which fields of `ModelConfig` each one differs from a plain Llama,
by its `config.json`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.models.config import ExpertsConfig, LayerConfig, NormConfig
from jaxtune.models.families.config_reader import FULL, SLIDING, HFConfigReader, layer_types, rope


def _plain(read: HFConfigReader) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: the class of transformers that computes it.
        overrides: the fields of `ModelConfig` in which it differs from a plain Llama, from its
            `config.json`.
        defaults: values that transformers assumes where `config.json` is silent and a plain Llama
            would differ.
        renames: parts of our paths and what they are called in files.

    """

    architecture: str
    overrides: Callable[[HFConfigReader], dict[str, Any]] = _plain
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()


def _by_type(read: HFConfigReader, otherwise: Callable[[int], str]) -> list[LayerConfig]:
    window = read("sliding_window")
    return [
        LayerConfig(window=window if kind == SLIDING else None)
        for kind in layer_types(read, otherwise)
    ]


def _full(read: HFConfigReader) -> tuple[LayerConfig, ...]:
    kinds = layer_types(read, lambda layer: FULL)
    if SLIDING in kinds:
        raise UserError(
            f"{read.where}: layer_types with {SLIDING} are not supported for {read('model_type')}."
        )
    return (LayerConfig(),) * len(kinds)


def _whole_rope(read: HFConfigReader) -> None:
    found = rope(read)
    if found.partial != 1.0:
        raise UserError(
            f"{read.where}: partial_rotary_factor {found.partial} is not supported for "
            f"{read('model_type')}."
        )


def _llama(read: HFConfigReader) -> dict[str, Any]:
    _whole_rope(read)
    bias = read("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": read("mlp_bias"), "layers": _full(read)}


def _windowed(read: HFConfigReader) -> dict[str, Any]:
    """Mistral and Mixtral: one window for all layers."""
    _whole_rope(read)
    window = read("sliding_window")
    layer_types(read, lambda layer: SLIDING)
    if window is None:
        return {"layers": _full(read)}
    if FULL in (read("layer_types") or []):
        raise UserError(
            f"{read.where}: layer_types with {FULL} beside a sliding_window are not supported for "
            f"{read('model_type')}."
        )
    return {"layers": (LayerConfig(window=window),) * read("num_hidden_layers")}


def _mixtral(read: HFConfigReader) -> dict[str, Any]:
    read.refuse("output_router_logits", False)
    varied = _windowed(read)
    experts = ExpertsConfig(
        read("num_local_experts"),
        read("num_experts_per_tok"),
        read("intermediate_size"),
        normalize=True,
    )
    return varied | {
        "layers": tuple(replace(layer, sparse=True) for layer in varied["layers"]),
        "experts": experts,
    }


def _window(read: HFConfigReader) -> int | None:
    """The window, which the file may name without its being used."""
    window = read("sliding_window")
    return window if read("use_sliding_window") else None


def _qwen_layers(read: HFConfigReader) -> tuple[LayerConfig, ...]:
    window = _window(read)
    first = read("max_window_layers")
    kinds = layer_types(
        read, lambda layer: SLIDING if window is not None and layer >= first else FULL
    )
    return tuple(LayerConfig(window=window if kind == SLIDING else None) for kind in kinds)


def _qwen2(read: HFConfigReader) -> dict[str, Any]:
    _whole_rope(read)
    return {"qkv_bias": True, "layers": _qwen_layers(read)}


def _qwen3(read: HFConfigReader) -> dict[str, Any]:
    _whole_rope(read)
    bias = read("attention_bias")
    return {"qk_norm": "head", "qkv_bias": bias, "o_bias": bias, "layers": _qwen_layers(read)}


def _qwen3_moe(read: HFConfigReader) -> dict[str, Any]:
    _whole_rope(read)
    read.refuse("output_router_logits", False)
    read("max_window_layers")  # transformers gives every layer the window, or none
    _full(read)
    window = _window(read)
    count, step = (
        read("num_local_experts") or read("num_experts"),
        read("decoder_sparse_step"),
    )  # two names for one number
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
    bias = read("attention_bias")
    layers = tuple(LayerConfig(window=window, sparse=kind) for kind in sparse)
    return {
        "qk_norm": "head",
        "qkv_bias": bias,
        "o_bias": bias,
        "layers": layers,
        "experts": experts,
    }


def _gemma(read: HFConfigReader) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    read.refuse("use_bidirectional_attention", False)
    read("hidden_act")  # an old name that transformers does not read for this family
    bias, hidden = read("attention_bias"), read("hidden_size")
    return {
        "norm": NormConfig(read("rms_norm_eps"), offset=1.0, wide=True),
        "norms": "sandwich",
        "activation": read("hidden_activation"),
        "embedding_scale": math.sqrt(hidden),
        "attention_scale": read("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": read("final_logit_softcapping"),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _gemma2(read: HFConfigReader) -> dict[str, Any]:
    _whole_rope(read)
    read.refuse("sliding_window_size", read("sliding_window"))  # an old second name
    layers = tuple(_by_type(read, lambda layer: FULL if layer % 2 else SLIDING))
    return _gemma(read) | {"layers": layers, "attention_softcap": read("attn_logit_softcapping")}


def _gemma3(read: HFConfigReader) -> dict[str, Any]:
    """Local layers with a window and their own RoPE, global ones with another, stretched."""
    read.refuse("attn_logit_softcapping", None, " for gemma3_text, as in transformers")
    pattern = read("sliding_window_pattern") or read("_sliding_window_pattern")
    kinds = _by_type(read, lambda layer: SLIDING if (layer + 1) % pattern else FULL)
    nested, scaling = read("rope_parameters") or {}, read("rope_scaling") or {}
    if nested and not nested.keys() <= {SLIDING, FULL}:
        raise UserError(
            f"{read.where}: rope_parameters of gemma3_text must be given for {SLIDING} and {FULL}."
        )
    local_theta = read("rope_local_base_freq")
    globally = rope(read, {**scaling, **(nested.get(FULL) or {})})
    locally = rope(read, {"rope_theta": local_theta, **(nested.get(SLIDING) or {})})
    layers = tuple(replace(layer, rope=0 if layer.window is None else 1) for layer in kinds)
    return _gemma(read) | {"qk_norm": "head", "ropes": (globally, locally), "layers": layers}


def _phi3(read: HFConfigReader) -> dict[str, Any]:
    found = rope(read)
    read(
        "original_max_position_embeddings"
    )  # written by every model of the family, of use to longrope only
    if found.kind not in ("default", "longrope", "yarn"):
        raise UserError(
            f"{read.where}: rope_type {found.kind!r} is not supported for phi3; supported are "
            "default and longrope."
        )
    window = read("sliding_window")
    layer_types(read, lambda layer: FULL)
    layers = (LayerConfig(window=window),) * read("num_hidden_layers")
    return {"fused": True, "ropes": (found,), "layers": layers}


def _olmo2(read: HFConfigReader) -> dict[str, Any]:
    _whole_rope(read)
    bias = read("attention_bias")
    norm = NormConfig(read("rms_norm_eps"), wide=True)
    return {
        "norms": "post",
        "qk_norm": "full",
        "norm": norm,
        "qkv_bias": bias,
        "o_bias": bias,
        "layers": _full(read),
    }


def _smollm3(read: HFConfigReader) -> dict[str, Any]:
    """Some layers have no rotary embedding (NoPE)."""
    _whole_rope(read)
    count, every = read("num_hidden_layers"), read("no_rope_layer_interval")
    rotary = read("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(count)]
    window = _window(read)
    read("max_window_layers")  # of Qwen's configuration, which transformers does not read here
    kinds = layer_types(
        read, lambda layer: SLIDING if window is not None and not rotary[layer] else FULL
    )
    bias = read("attention_bias")
    layers = tuple(
        LayerConfig(window=window if kind == SLIDING else None, rope=0 if turns else None)
        for kind, turns in zip(kinds, rotary, strict=False)
    )
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": read("mlp_bias"), "layers": layers}


def _granite(read: HFConfigReader) -> dict[str, Any]:
    return _llama(read) | {
        "embedding_scale": read("embedding_multiplier"),
        "attention_scale": read("attention_multiplier"),
        "residual_scale": read("residual_multiplier"),
        "logit_scale": 1 / read("logits_scaling"),
    }


# What transformers assumes of a Llama, and of most others.
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
