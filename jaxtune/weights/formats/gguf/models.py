"""The families in GGUF: llama.cpp's names and metadata, and what it changes in the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_model
from jaxtune.models.families.from_hf import from_hf
from jaxtune.models.families.table import FAMILIES
from jaxtune.weights.formats.gguf.file import GGUF
from jaxtune.weights.interleave import half_split, interleaved
from jaxtune.weights.mapping import leaf_mappings
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier", "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFFamily:
    """How llama.cpp stores a family.

    Attributes:
        architecture: its name in `gguf.MODEL_ARCH`.
        interleaved: whether the rows of q and k are in the order of interleaved rotary pairs.
        norm_offset: what was added to the norms' weights.
        keys: metadata beyond what all families have, with its key in config.json.
        implied: keys of config.json that are constants in llama.cpp's code for this family.

    """

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0
    keys: Mapping[str, str] = field(default_factory=dict)
    implied: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    """Return Gemma's constants: scores are scaled by the head's size, in the 27B models by a
    head's share of the embedding.
    """
    large = {("gemma2", 46), ("gemma3_text", 62)}
    share = config["hidden_size"] // config["num_attention_heads"]
    by_share = (config["model_type"], config["num_hidden_layers"]) in large
    constants = {
        "query_pre_attn_scalar": share if by_share else config["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
    }
    if config["model_type"] == "gemma3_text":
        constants["sliding_window_pattern"] = 6
    return constants


_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_MIXTRAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}

# By the model_type of config.json.
GGUF_FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("LLAMA", interleaved=True),
    "mistral": GGUFFamily("LLAMA", interleaved=True),
    "mixtral": GGUFFamily("LLAMA", interleaved=True, keys=_MIXTRAL),
    "qwen2": GGUFFamily("QWEN2"),
    "qwen3": GGUFFamily("QWEN3"),
    "qwen3_moe": GGUFFamily(
        "QWEN3MOE", keys=_EXPERTS, implied=lambda config: {"norm_topk_prob": True}
    ),
    "gemma2": GGUFFamily("GEMMA2", norm_offset=1.0, keys=_WINDOW | _CAPS, implied=_gemma),
    "gemma3_text": GGUFFamily("GEMMA3", norm_offset=1.0, keys=_WINDOW, implied=_gemma),
    "phi3": GGUFFamily("PHI3", keys=_WINDOW),
    "olmo2": GGUFFamily("OLMO2"),
    "smollm3": GGUFFamily("SMOLLM3", interleaved=True),
    "granite": GGUFFamily("GRANITE", interleaved=True, keys=_GRANITE),
}


def config_json(file: GGUF) -> dict[str, Any]:
    """Return what `config.json` would say of this file.

    Raises:
        UserError: another architecture, or metadata that this code does not implement.

    """
    kind = _model_type(file)
    family = GGUF_FAMILIES[kind]
    metadata = _family_metadata(file, kind)
    heads = metadata["attention.head_count"]
    embedding = file.tensors.get("token_embd.weight")
    config = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": 0 if embedding is None else embedding.shape[0],
        "hidden_size": metadata["embedding_length"],
        "intermediate_size": metadata.get("feed_forward_length", 0),
        "num_hidden_layers": metadata["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": metadata.get("attention.key_length") or metadata["embedding_length"] // heads,
        "rms_norm_eps": _short(metadata.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "max_position_embeddings": metadata.get("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors and kind != "qwen2",
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    for gguf_key, hf_key in family.keys.items():
        if gguf_key in metadata:
            config[hf_key] = _number(metadata[gguf_key])
    config |= family.implied(config)
    return config | _rope(file, metadata, config)


def _family_metadata(file: GGUF, kind: str) -> dict[str, Any]:
    """Return the metadata of the file's architecture without its prefix, checked."""
    prefix = str(file.metadata["general.architecture"]) + "."
    metadata = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    known = _READ | GGUF_FAMILIES[kind].keys.keys()
    if unknown := [prefix + key for key, value in metadata.items() if key not in known and value]:
        raise UserError(
            f"{file.path}: metadata that jaxtune does not understand: {listed(unknown)}."
        )
    required = ["block_count", "embedding_length", "attention.head_count"]
    if kind != "qwen3_moe":
        required.append("feed_forward_length")
    if missing := [prefix + key for key in required if key not in metadata]:
        raise UserError(f"{file.path}: the metadata {listed(missing)} is missing.")
    counts = [*required, "attention.head_count_kv", "attention.key_length"]
    if wrong := [
        f"{prefix}{key} = {metadata[key]!r}"
        for key in counts
        if key in metadata and (not isinstance(metadata[key], int) or metadata[key] < 1)
    ]:
        raise UserError(
            f"{file.path}: the metadata {listed(wrong)} is not a positive whole number."
        )
    return metadata


def _model_type(file: GGUF) -> str:
    architecture = file.metadata.get("general.architecture")
    if architecture == "llama":
        return "mixtral" if file.metadata.get("llama.expert_count") else "llama"
    kind = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}.get(
        str(architecture), str(architecture)
    )
    if kind not in GGUF_FAMILIES:
        supported = sorted({family.architecture.lower() for family in GGUF_FAMILIES.values()})
        raise UserError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; supported are "
            f"{listed(supported, 20)}."
        )
    return kind


def named_tensors(file: GGUF) -> Tensors:
    """Return the tensors under Hugging Face's names and in its layout; the others keep their own
    names, so that they are refused by name.
    """
    config = from_hf(config_json(file), str(file.path))
    named: Tensors = {}
    # The configuration holds these.
    used = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    for name, location in tensor_locations(config).items():
        if location.name in file.tensors:
            used.add(location.name)
            named[name] = _from_llama_cpp(file.tensors[location.name], name, location, config)
    return named | {name: tensor for name, tensor in file.tensors.items() if name not in used}


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor of Hugging Face's lies in a GGUF file.

    Attributes:
        name: llama.cpp's name.
        expert: which part of a tensor that holds all experts of a layer; None elsewhere.

    """

    name: str
    expert: int | None = None


def tensor_locations(config: ModelConfig) -> dict[str, TensorLocation]:
    """Return the location of every tensor of a model, by Hugging Face's name."""
    import gguf

    architecture = gguf.MODEL_ARCH[GGUF_FAMILIES[config.raw["model_type"]].architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    locations = {}
    state = nnx.split(abstract_model(config, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32)))[1]
    for row in leaf_mappings(state, config):
        generic = [str(part) for part in row.path if not isinstance(part, int)]
        for number, name in enumerate(row.names):
            layer = name.split(".")[2] if row.stack else None
            modules = generic[:-1] if layer is None else [*generic[:2], layer, *generic[2:-1]]
            gguf_name = names.get_name(".".join(modules))
            assert gguf_name is not None, modules
            expert = number % row.stack[1] if len(row.stack) == 2 else None
            locations[name] = TensorLocation(f"{gguf_name}.{generic[-1]}", expert)
    return locations


def _from_llama_cpp(
    tensor: LazyTensor, name: str, location: TensorLocation, config: ModelConfig
) -> LazyTensor:
    """Return the tensor as Hugging Face stores it; the inverse of `to_llama_cpp`."""
    if location.expert is not None:
        return _part(tensor, location.expert)
    family = GGUF_FAMILIES[config.raw["model_type"]]
    if family.interleaved and ".q_proj." in name:
        return half_split(tensor, config.num_heads)
    if family.interleaved and ".k_proj." in name:
        return half_split(tensor, config.num_kv_heads)
    if family.norm_offset and name.endswith("norm.weight"):
        return LazyTensor(
            tensor.shape,
            tensor.dtype,
            lambda index: tensor.read(index) - tensor.dtype.type(family.norm_offset),
        )
    return tensor


def to_llama_cpp(tensor: LazyTensor, name: str, config: ModelConfig) -> LazyTensor:
    """Return the tensor as llama.cpp stores it, in its own dtype."""
    family = GGUF_FAMILIES[config.raw["model_type"]]
    if family.interleaved and ".q_proj." in name:
        return interleaved(tensor, config.num_heads)
    if family.interleaved and ".k_proj." in name:
        return interleaved(tensor, config.num_kv_heads)
    if family.norm_offset and name.endswith("norm.weight"):
        wide = tensor.astype(np.dtype("float32"))
        return LazyTensor(
            wide.shape, wide.dtype, lambda index: wide.read(index) + np.float32(family.norm_offset)
        )
    return tensor


def round_trip(
    tensors: Tensors, config: ModelConfig, stored: Callable[[LazyTensor, str], LazyTensor]
) -> Tensors:
    """Return what `named_tensors` would read from a file with these tensors, each rounded by
    `stored` to the type the file keeps it in.
    """
    after = {}
    for name, tensor in tensors.items():
        rounded = stored(to_llama_cpp(tensor, name, config), name)
        after[name] = _from_llama_cpp(rounded, name, TensorLocation(name), config)
    return after


def _part(tensor: LazyTensor, expert: int) -> LazyTensor:
    def read(index: Index) -> np.ndarray:
        inner = index or tuple(slice(None) for _ in tensor.shape[1:])
        return tensor.read((slice(expert, expert + 1), *inner))[0]

    return LazyTensor(tensor.shape[1:], tensor.dtype, read, tensor.quantized)


def _rope(file: GGUF, metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json for the rotary embedding."""
    theta = _short(metadata.get("rope.freq_base", 10000.0))
    options = _scaling(file, metadata, config, theta)
    if config["model_type"] == "gemma3_text":
        return {"rope_theta": theta, "rope_local_base_freq": 10000.0, "rope_scaling": options}
    if config["model_type"] == "phi3":
        share = metadata.get("rope.dimension_count", config["head_dim"]) / config["head_dim"]
        context = metadata.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        return {
            "rope_parameters": {"rope_theta": theta, "partial_rotary_factor": share, **options},
            "original_max_position_embeddings": context,
        }
    if metadata.get("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise UserError(
            f"{file.path}: rotary embeddings over a part of a head are not supported for "
            f"{config['model_type']}."
        )
    return {"rope_parameters": {"rope_theta": theta, **options}}


def _scaling(
    file: GGUF, metadata: dict[str, Any], config: dict[str, Any], theta: float
) -> dict[str, Any]:
    kind = metadata.get("rope.scaling.type", "none")
    if "rope_factors_long.weight" in file.tensors:
        long, short = (
            file.tensors[f"rope_factors_{size}.weight"].all().tolist() for size in ("long", "short")
        )
        options = {
            "rope_type": "longrope",
            "long_factor": [_short(x) for x in long],
            "short_factor": [_short(x) for x in short],
        }
        factor = metadata.get("rope.scaling.attn_factor")
        return options | ({} if factor is None else {"attention_factor": _short(factor)})
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, config["head_dim"], theta)
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": _short(metadata["rope.scaling.factor"])}
    if kind == "yarn":
        options = {"factor": _short(metadata["rope.scaling.factor"])}
        if length := metadata.get("rope.scaling.original_context_length"):
            options["original_max_position_embeddings"] = length
        return {"rope_type": "yarn", **options}
    raise UserError(f"{file.path}: rope scaling {kind!r} is not supported.")


def _llama3(file: GGUF, head_dim: int, theta: float) -> dict[str, Any]:
    """Recover Llama 3's scaling from the divisor of every frequency, which is all that the format
    keeps of it.
    """
    divisors = file.tensors["rope_freqs.weight"].all().astype(np.float64)
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    factor = _short(float(divisors.max()))
    for context in (8192, *(1 << size for size in range(20))):
        blend = np.clip((context * plain / (2 * np.pi) - 1.0) / 3.0, 0, 1)
        expected = 1 / ((1 - blend) / factor + blend)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise UserError(
        f"{file.path}: rope_freqs.weight is not Llama 3's frequency scaling (from 1 to 4 turns), "
        "the only one that is supported."
    )


def _number(value: Any) -> Any:
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float:
    """Return a float32 as the shortest decimal that rounds to it, such as 1e-05 instead of
    9.999999747378752e-06.
    """
    return float(str(np.float32(value)))
