"""The families in GGUF: llama.cpp's names and metadata, and what it changes in the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_model
from jaxtune.models.families.config_reader import FULL, SLIDING
from jaxtune.models.families.from_hf import from_hf
from jaxtune.models.families.table import FAMILIES
from jaxtune.weights.formats.gguf.file import GGUF
from jaxtune.weights.formats.gguf.metadata import check_sizes, family_metadata
from jaxtune.weights.formats.gguf.rope import ROPE_TENSORS, read_rope, short
from jaxtune.weights.interleave import half_split, interleaved
from jaxtune.weights.mapping import leaf_mappings
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

# Kinds of rotary embeddings that llama.cpp computes: for every family here; for those whose code
# takes divisors of the frequencies too; for those with two rotary embeddings.
_ROPES = ("default", "linear", "yarn")
_ROPES_WITH_DIVISORS = (*_ROPES, "llama3", "longrope")


@dataclass(frozen=True)
class GGUFFamily:
    """How llama.cpp stores a family.

    Attributes:
        architecture: its name in `gguf.MODEL_ARCH`.
        interleaved: whether the rows of q and k are in the order of interleaved rotary pairs.
        norm_offset: what was added to the norms' weights.
        keys: metadata beyond what all families have, with its key in config.json.
        ropes: the kinds of rotary embeddings that llama.cpp computes for it.
        biases: whether llama.cpp reads biases of the attention's output and of the MLP.
        square_attention: whether llama.cpp takes the heads to be as wide together as the
            embedding.
        head: whether llama.cpp wants a head of its own (`own`), the embedding as head (`tied`), or
            takes either.
        windows: whether llama.cpp computes sliding windows.
        implied: keys of config.json that are constants in llama.cpp's code for this family.

    """

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0
    keys: Mapping[str, str] = field(default_factory=dict)
    ropes: tuple[str, ...] = _ROPES
    biases: bool = False
    square_attention: bool = False
    head: Literal["own", "tied", "either"] = "either"
    windows: bool = False
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
_FINAL_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_CAPS = _FINAL_CAP | {"attn_logit_softcapping": "attn_logit_softcapping"}
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

_LLAMA: Any = {"interleaved": True, "ropes": _ROPES_WITH_DIVISORS, "biases": True}
_GEMMA: Any = {
    "norm_offset": 1.0,
    "ropes": ("default", "linear"),
    "windows": True,
    "implied": _gemma,
}

# By the model_type of config.json.
GGUF_FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("LLAMA", **_LLAMA),
    "mistral": GGUFFamily("LLAMA", **_LLAMA),
    "mixtral": GGUFFamily("LLAMA", keys=_MIXTRAL, **_LLAMA),
    "qwen2": GGUFFamily("QWEN2", square_attention=True),
    "qwen3": GGUFFamily("QWEN3"),
    "qwen3_moe": GGUFFamily(
        "QWEN3MOE", keys=_EXPERTS, implied=lambda config: {"norm_topk_prob": True}
    ),
    "gemma2": GGUFFamily("GEMMA2", keys=_WINDOW | _CAPS, head="tied", **_GEMMA),
    "gemma3_text": GGUFFamily("GEMMA3", keys=_WINDOW | _FINAL_CAP, **_GEMMA),
    "phi3": GGUFFamily(
        "PHI3",
        keys=_WINDOW,
        ropes=("default", "longrope", "yarn"),
        square_attention=True,
    ),
    "olmo2": GGUFFamily("OLMO2", square_attention=True, head="own"),
    "smollm3": GGUFFamily("SMOLLM3", interleaved=True),
    "granite": GGUFFamily("GRANITE", keys=_GRANITE, **_LLAMA),
}


def config_json(file: GGUF) -> dict[str, Any]:
    """Return what `config.json` would say of this file.

    Raises:
        UserError: another architecture, or metadata that this code does not implement.

    """
    kind = _model_type(file)
    family = GGUF_FAMILIES[kind]
    required = ["block_count", "embedding_length", "attention.head_count"]
    if kind != "qwen3_moe":
        required.append("feed_forward_length")
    metadata = family_metadata(file, family.keys, required, has_windows=family.windows)
    check_sizes(file, metadata)
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
        "rms_norm_eps": short(metadata.get("attention.layer_norm_rms_epsilon", 1e-6)),
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
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None
    if family.windows:
        config |= _layer_types(metadata, kind)
    config |= family.implied(config)
    return config | read_rope(file, metadata, config)


def _layer_types(metadata: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return which layers have a window, where the file says it otherwise than the family."""
    pattern, count = metadata.get("attention.sliding_window_pattern"), metadata["block_count"]
    if kind == "gemma3_text" and not metadata.get("attention.sliding_window"):
        return {"layer_types": [FULL] * count}
    if isinstance(pattern, list):
        return {"layer_types": [SLIDING if windowed else FULL for windowed in pattern]}
    if pattern is None:
        return {}
    return {"layer_types": [SLIDING if (i + 1) % pattern else FULL for i in range(count)]}


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
    used: set[str] = set(ROPE_TENSORS)
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
            if gguf_name is None:
                raise UserError(
                    f"GGUF has no place for the tensor {name} of {config.raw['model_type']}."
                )
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
    for part, heads in ((".q_proj.", config.num_heads), (".k_proj.", config.num_kv_heads)):
        if family.interleaved and part in name:
            # One of another shape goes on as it is, to be refused with what it should be.
            fits = tensor.shape[0] == heads * config.head_dim
            return half_split(tensor, heads) if fits else tensor
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


def _number(value: Any) -> Any:
    return short(value) if isinstance(value, float) else value
