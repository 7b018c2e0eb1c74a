"""The architecture that a `config.json` in either dialect describes."""

import math
from dataclasses import replace
from typing import Any

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import LayerConfig, ModelConfig, NormConfig
from jaxtune.models.families.config_reader import HFConfigReader, read_rope
from jaxtune.models.families.config_types import check_config
from jaxtune.models.families.table import DEFAULTS, FAMILIES, Family
from jaxtune.models.layers import ACTIVATIONS

# Keys of config.json that do not change what a model computes.
# Old versions of transformers wrote their settings of generation and of other tasks there too.
_NEUTRAL = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "model_type",
    "pad_token_id", "pretraining_tp",
    "torch_dtype", "transformers_version", "transformers.js_config", "use_cache",
    "_attn_implementation_autoset", "cache_implementation",
    "is_llama_config", "unsloth_fixed", "unsloth_version", "torchscript", "_commit_hash",
    "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "is_encoder_decoder", "tokenizer_class",
    "task_specific_params", "name_or_path", "auto_map", "unk_token_id", "_attn_implementation",
    "attn_implementation",
    "max_sequence_length",
    "sep_token_id", "decoder_start_token_id", "prefix", "finetuning_task", "pruned_heads",
    "tie_encoder_decoder", "tf_legacy_loss", "use_bfloat16", "gradient_checkpointing",
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
}  # fmt: skip
# Keys that matter for training from scratch, and not for fine-tuning here.
_PRETRAINING = {
    "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "router_aux_loss_coef",
    "router_jitter_noise",
}  # fmt: skip


def from_hf(raw: dict[str, Any], where: str) -> ModelConfig:
    """Return the architecture that a `config.json` describes.

    Args:
        raw: the parsed file, in the dialect of `rope_theta` + `rope_scaling` or of
            `rope_parameters`.
        where: the file, for messages.

    Raises:
        UserError: the architecture, a key or a value is not supported.

    """
    family = find_family(raw, where)
    read = HFConfigReader(raw, where, DEFAULTS | dict(family.defaults))
    if missing := [
        key
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        if raw.get(key) is None
    ]:
        raise UserError(f"{where}: the keys {listed(missing)} are missing.")
    if read("quantization_config"):
        raise UserError(
            f"{where}: quantization_config: weights quantized by other tools cannot be read. Use "
            "the unquantized model."
        )
    heads, hidden = read("num_attention_heads"), read("hidden_size")
    if not (head_dim := read("head_dim") or hidden // heads):
        raise UserError(
            f"{where}: hidden_size {hidden} leaves nothing for each of num_attention_heads {heads}."
        )
    plain = ModelConfig(
        vocab_size=read("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read("intermediate_size"),
        num_heads=heads,
        num_kv_heads=read("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_positions=read("max_position_embeddings"),
        norm=NormConfig(read("rms_norm_eps")),
        ropes=(),
        layers=(LayerConfig(),) * read("num_hidden_layers"),
        tie_embeddings=read("tie_word_embeddings"),
        attention_scale=1 / math.sqrt(head_dim),
        raw=dict(raw),
    )
    overrides = family.overrides(read)
    config = replace(plain, **overrides)
    if not config.ropes:
        config = replace(config, ropes=(read_rope(read),))
    if "activation" not in overrides:
        config = replace(config, activation=read("hidden_act"))
    _check(config, read)
    return config


def read_setting(raw: dict[str, Any], key: str) -> Any:
    """Return the value of `key` in a `config.json`, or its family's default if it lacks the key."""
    family = find_family(raw, "config.json")
    return HFConfigReader(raw, "config.json", DEFAULTS | dict(family.defaults))(key)


def find_family(raw: dict[str, Any], where: str) -> Family:
    """Return the family that `model_type` names.

    Raises:
        UserError: the family is not supported, or the model has another head than a language
            model's.

    """
    check_config(raw, where)
    kind, names = raw.get("model_type"), raw.get("architectures") or []
    family = FAMILIES.get(str(kind))
    if family is None or any(name != family.architecture for name in names):
        supported = listed(sorted(known.architecture for known in FAMILIES.values()), 20)
        raise UserError(
            f"{where}: architecture {listed(names) or '(none named)'} (model_type {kind!r}) is "
            f"not supported; supported are {supported}."
        )
    return family


def _inert(config: ModelConfig) -> dict[str, Any]:
    """Return keys of published files that change nothing as long as they have these values."""
    return {
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "num_key_value_groups": config.num_heads // config.num_kv_heads,
        "use_qk_norm": config.qk_norm is not None,
    }


def _check(config: ModelConfig, read: HFConfigReader) -> None:
    """Raise a UserError for a key that nothing asked for and for what no family supports."""
    where = read.where
    known = (
        _NEUTRAL
        | _PRETRAINING
        | read.keys_read
        | {key for key, value in _inert(config).items() if read.raw.get(key) == value}
    )
    unknown = [
        key
        for key, value in read.raw.items()
        if key not in known and value not in (None, False, 0, [], {})
    ]
    if unknown:
        raise UserError(
            f"{where}: keys that jaxtune does not understand: {listed(unknown)}. Remove those that "
            "do not change the model."
        )
    if config.activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: the activation {config.activation!r} is not supported; supported are "
            f"{listed(ACTIVATIONS)}."
        )
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{where}: num_key_value_heads ({config.num_kv_heads}) must divide "
            f"num_attention_heads ({config.num_heads})."
        )
    for rope in config.ropes:
        if (rotated := int(config.head_dim * rope.partial)) % 2 or not rotated:
            raise UserError(
                f"{where}: partial_rotary_factor {rope.partial} of head_dim {config.head_dim} is "
                f"{rotated} dimensions; rotary embeddings need an even number of them."
            )
        for name in ("short_factor", "long_factor"):
            if (factors := rope.get(name)) is not None and len(factors) != rotated // 2:
                raise UserError(
                    f"{where}: {name} has {len(factors)} numbers; the rotary embedding has "
                    f"{rotated // 2} frequencies."
                )
    if any(layer.window is not None and layer.window < 1 for layer in config.layers):
        raise UserError(f"{where}: sliding_window must be at least 1.")
    experts = config.experts
    if experts is not None and experts.count and not 1 <= experts.per_token <= experts.count:
        raise UserError(
            f"{where}: num_experts_per_tok ({experts.per_token}) must be from 1 to the number of "
            f"experts ({experts.count})."
        )
