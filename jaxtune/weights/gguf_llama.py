"""The Llama architecture in GGUF: llama.cpp's names and metadata, and its row order of q and k undone."""

from typing import Any

import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.weights.gguf_file import GGUF
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned", "vocab_size",
}  # fmt: skip


def config_json(file: GGUF) -> dict[str, Any]:
    """What `config.json` would say of this file.

    Raises:
        UserError: another architecture, or metadata whose meaning this code does not implement.

    """
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file.path}: GGUF architecture {architecture!r} is not supported; supported is 'llama'.")
    found = {key.removeprefix("llama."): value for key, value in file.metadata.items() if key.startswith("llama.")}
    if unknown := [key for key, value in found.items() if key not in _READ and value]:
        raise UserError(f"{file.path}: metadata that jaxtune does not understand: {listed(f'llama.{key}' for key in unknown)}.")
    required = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    if missing := [key for key in required if key not in found]:
        raise UserError(f"{file.path}: the metadata {listed(f'llama.{key}' for key in missing)} is missing.")
    heads = found["attention.head_count"]
    head_dim = found.get("attention.key_length") or found["embedding_length"] // heads
    if found.get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{file.path}: rotary embeddings over a part of a head are not supported.")
    tokenizer = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        "hidden_size": found["embedding_length"],
        "intermediate_size": found["feed_forward_length"],
        "num_hidden_layers": found["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": found.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _short(found.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "max_position_embeddings": found.get("context_length", 2048),
        "rope_parameters": _rope(file, found, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": tokenizer["bos"],
        "eos_token_id": tokenizer["eos"],
        "pad_token_id": tokenizer["padding"],
    }


def tensors(file: GGUF) -> Tensors:
    """The tensors under Hugging Face's names and in its row order; names it does not know are kept, to be refused by name."""
    heads = file.metadata["llama.attention.head_count"]
    kv_heads = file.metadata.get("llama.attention.head_count_kv", heads)
    named: Tensors = {}
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":
            continue  # read as part of the configuration
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("blk.") and stem.split(".", 2)[2] in _LAYER:
            _, layer, part = stem.split(".", 2)
            if part in ("attn_q", "attn_k"):
                tensor = _half_split(tensor, heads if part == "attn_q" else kv_heads)
            named[f"model.layers.{layer}.{_LAYER[part]}.{suffix}"] = tensor
        else:
            named[f"{_TOP.get(stem, stem)}.{suffix}"] = tensor
    return named


def _half_split(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows from llama.cpp's interleaved rotary pairs back to Hugging Face's halves."""
    rows = np.arange(tensor.shape[0]).reshape(heads, tensor.shape[0] // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def read(index: Index) -> np.ndarray:
        return tensor.all()[rows][index]

    return LazyTensor(tensor.shape, tensor.dtype, read, tensor.quantised)


def _rope(file: GGUF, found: dict[str, Any], head_dim: int) -> dict[str, Any]:
    theta = _short(found.get("rope.freq_base", 10000.0))
    kind = found.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": theta, **_llama3(file, head_dim, theta)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": _short(found["rope.scaling.factor"])}
    if kind == "yarn":
        options = {"factor": _short(found["rope.scaling.factor"])}
        if length := found.get("rope.scaling.original_context_length"):
            options["original_max_position_embeddings"] = length
        return {"rope_theta": theta, "rope_type": "yarn", **options}
    raise UserError(f"{file.path}: rope scaling {kind!r} is not supported.")


def _llama3(file: GGUF, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's numbers from the divisors of every frequency, which is all that the format keeps of them."""
    divisors = file.tensors["rope_freqs.weight"].all().astype(np.float64)
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    options = {
        "rope_type": "llama3",
        "factor": _short(float(divisors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * plain / (2 * np.pi)
    blend = np.clip((turns - 1.0) / 3.0, 0, 1)
    expected = 1 / ((1 - blend) / options["factor"] + blend)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{file.path}: rope_freqs.weight is not Llama 3's frequency scaling, the only one that is supported.")
    return options


def _short(value: float) -> float:
    """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
