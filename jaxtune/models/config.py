"""The architecture of a model, read from either dialect of Hugging Face's `config.json`."""

from dataclasses import dataclass, field
from typing import Any

from jaxtune.core.errors import UserError, listed


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: its base and how it is stretched to longer texts.

    `kind` is one of default, linear, dynamic, llama3, yarn; `options` holds that kind's numbers under the names of `config.json`.
    """

    kind: str = "default"
    theta: float = 10000.0
    options: tuple[tuple[str, Any], ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """The option `name`, or `default`."""
        return dict(self.options).get(name, default)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. `raw` is the `config.json` it came from, written back unchanged on export."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: RopeConfig
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    raw: dict[str, Any] = field(compare=False, hash=False, repr=False, default_factory=dict)


# What each kind of RoPE must have and may have, beside rope_type and rope_theta.
_ROPE_OPTIONS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}

# Keys of config.json that do not change what a Llama computes.
_NEUTRAL = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "is_llama_config", "model_type", "pad_token_id", "pretraining_tp", "torch_dtype",
    "transformers_version", "transformers.js_config", "use_cache", "_attn_implementation_autoset",
    "unsloth_fixed", "unsloth_version", "torchscript", "layer_types", "_commit_hash", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "is_encoder_decoder", "tokenizer_class", "task_specific_params", "name_or_path",
}  # fmt: skip
_READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act",
}  # fmt: skip


def from_hf(raw: dict[str, Any], where: str) -> ModelConfig:
    """The architecture that a `config.json` describes.

    Args:
        raw: the parsed file, in the dialect of `rope_theta` + `rope_scaling` or of `rope_parameters`.
        where: the file, for messages.

    Raises:
        UserError: another architecture, or a key or value whose meaning this code does not implement.

    """
    names = raw.get("architectures") or []
    if raw.get("model_type") != "llama" or any(name != "LlamaForCausalLM" for name in names):
        what = listed(names) or f"model_type {raw.get('model_type')!r}"
        raise UserError(f"{where}: architecture {what} is not supported; supported is LlamaForCausalLM (model_type llama).")
    if missing := [key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if key not in raw]:
        raise UserError(f"{where}: the keys {listed(missing)} are missing.")
    _refuse_unknown(raw, where)
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    config = ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw.get("intermediate_size", 11008),
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        max_positions=raw.get("max_position_embeddings", 2048),
        rope=_rope(raw, where),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        raw=dict(raw),
    )
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{where}: num_key_value_heads ({config.num_kv_heads}) must divide num_attention_heads ({heads}).")
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim ({config.head_dim}) is odd; rotary embeddings need an even one.")
    return config


def _refuse_unknown(raw: dict[str, Any], where: str) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported for Llama; supported is 'silu'.")
    if raw.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config: weights quantised by other tools cannot be read. Use the unquantised model."
        )
    if any(kind != "full_attention" for kind in raw.get("layer_types") or []):
        raise UserError(f"{where}: layer_types other than full_attention are not supported for Llama.")
    known = _NEUTRAL | _READ | {"quantization_config"}
    unknown = [key for key, value in raw.items() if key not in known and value not in (None, False, 0, [], {})]
    if unknown:
        raise UserError(
            f"{where}: keys that jaxtune does not understand: {listed(unknown)}. Remove what does not change the model."
        )


def _rope(raw: dict[str, Any], where: str) -> RopeConfig:
    found = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = found.pop("rope_theta", None)
    theta = float(raw.get("rope_theta", 10000.0) if theta is None else theta)
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    if kind not in _ROPE_OPTIONS:
        raise UserError(f"{where}: rope_type {kind!r} is not supported; supported are {listed(_ROPE_OPTIONS)}.")
    required, optional = _ROPE_OPTIONS[kind]
    if (partial := found.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor {partial} is not supported for Llama.")
    found = {key: value for key, value in found.items() if value is not None}
    if missing := sorted(required - found.keys()):
        raise UserError(f"{where}: rope_type {kind} needs {listed(missing)}.")
    if unknown := sorted(found.keys() - required - optional):
        raise UserError(f"{where}: rope_type {kind} has keys that jaxtune does not understand: {listed(unknown)}.")
    return RopeConfig(kind, theta, tuple(sorted(found.items())))
