"""The families in GGUF: llama.cpp's names and metadata, and what it changes in the weights,
undone.
"""

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
from jaxtune.weights.formats.interleave import half_split, interleaved
from jaxtune.weights.mapping import leaf_mappings
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
    "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned",
    "vocab_size",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """How llama.cpp stores a family.

    Attributes:
        architecture: its name in `gguf.MODEL_ARCH`.
        interleaved: whether the rows of q and k are in the order of interleaved rotary pairs.
        norm_offset: what was added to the norms' weights.
        keys: metadata beyond the common, and the key of config.json that holds it.
        implied: what llama.cpp's code holds as constants for this family and config.json says.

    """

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0
    keys: Mapping[str, str] = field(default_factory=dict)
    implied: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    """Scores are scaled by the head's size, in the 27B models by the width of a head's share of
    the embedding.
    """
    large = {("gemma2", 46), ("gemma3_text", 62)}
    share = config["hidden_size"] // config["num_attention_heads"]
    by_share = (config["model_type"], config["num_hidden_layers"]) in large
    rest = {"hidden_activation": "gelu_pytorch_tanh"} | (
        {"sliding_window_pattern": 6} if config["model_type"] == "gemma3_text" else {}
    )
    return {"query_pre_attn_scalar": share if by_share else config["head_dim"], **rest}


_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GRANITE = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}  # fmt: skip
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_MIXTRAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}

# By model_type of config.json.
MEANINGS: dict[str, Meaning] = {
    "llama": Meaning("LLAMA", interleaved=True),
    "mistral": Meaning("LLAMA", interleaved=True),
    "mixtral": Meaning("LLAMA", interleaved=True, keys=_MIXTRAL),
    "qwen2": Meaning("QWEN2"),
    "qwen3": Meaning("QWEN3"),
    "qwen3_moe": Meaning(
        "QWEN3MOE", keys=_EXPERTS, implied=lambda config: {"norm_topk_prob": True}
    ),
    "gemma2": Meaning("GEMMA2", norm_offset=1.0, keys=_WINDOW | _CAPS, implied=_gemma),
    "gemma3_text": Meaning("GEMMA3", norm_offset=1.0, keys=_WINDOW, implied=_gemma),
    "phi3": Meaning("PHI3", keys=_WINDOW),
    "olmo2": Meaning("OLMO2"),
    "smollm3": Meaning("SMOLLM3", interleaved=True),
    "granite": Meaning("GRANITE", interleaved=True, keys=_GRANITE),
}


def config_json(file: GGUF) -> dict[str, Any]:
    """What `config.json` would say of this file.

    Raises:
        UserError: another architecture, or metadata whose meaning this code does not implement.

    """
    kind = _model_type(file)
    meaning, prefix = MEANINGS[kind], str(file.metadata["general.architecture"]) + "."
    found = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    if unknown := [
        key for key, value in found.items() if key not in _READ | meaning.keys.keys() and value
    ]:
        raise UserError(
            f"{file.path}: metadata that jaxtune does not understand: "
            f"{listed(prefix + key for key in unknown)}."
        )
    required = (
        "block_count",
        "embedding_length",
        "attention.head_count",
        *([] if kind == "qwen3_moe" else ["feed_forward_length"]),
    )
    if missing := [key for key in required if key not in found]:
        raise UserError(
            f"{file.path}: the metadata {listed(prefix + key for key in missing)} is missing."
        )
    counts = [
        key
        for key in (*required, "attention.head_count_kv", "attention.key_length")
        if key in found
    ]
    if wrong := [key for key in counts if not isinstance(found[key], int) or found[key] < 1]:
        raise UserError(
            f"{file.path}: the metadata "
            f"{listed(f'{prefix}{key} = {found[key]!r}' for key in wrong)} is no positive whole "
            "number."
        )
    heads = found["attention.head_count"]
    head_dim = found.get("attention.key_length") or found["embedding_length"] // heads
    tokenizer = {
        name: file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "padding")
    }
    config = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": file.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in file.tensors
        else 0,
        "hidden_size": found["embedding_length"],
        "intermediate_size": found.get("feed_forward_length", 0),
        "num_hidden_layers": found["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": found.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _short(found.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "max_position_embeddings": found.get("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors and kind != "qwen2",
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": tokenizer["bos"],
        "eos_token_id": tokenizer["eos"],
        "pad_token_id": tokenizer["padding"],
    }
    config |= {
        ours: _number(found[theirs]) for theirs, ours in meaning.keys.items() if theirs in found
    }
    config |= meaning.implied(config)
    return config | _rope(file, found, config)


def _model_type(file: GGUF) -> str:
    architecture = file.metadata.get("general.architecture")
    if architecture == "llama":
        return "mixtral" if file.metadata.get("llama.expert_count") else "llama"
    kind = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}.get(
        str(architecture), str(architecture)
    )
    if kind not in MEANINGS:
        supported = listed(
            sorted({meaning.architecture.lower() for meaning in MEANINGS.values()}), 20
        )
        raise UserError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; supported are "
            f"{supported}."
        )
    return kind


def tensors(file: GGUF) -> Tensors:
    """The tensors under Hugging Face's names and in its layout; those that no name belongs to
    are kept, to be refused by name.
    """
    config = from_hf(config_json(file), str(file.path))
    meaning = MEANINGS[config.raw["model_type"]]
    named: Tensors = {}
    used = {
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    }  # read as part of the configuration
    for name, place in places(config).items():
        if place.name in file.tensors:
            used.add(place.name)
            named[name] = _undone(file.tensors[place.name], name, place, meaning, config)
    return named | {name: tensor for name, tensor in file.tensors.items() if name not in used}


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor of Hugging Face's lies in a GGUF file; `expert`: which part of a tensor
    that holds all experts of a layer.
    """

    name: str
    expert: int | None = None


def places(config: ModelConfig) -> dict[str, TensorLocation]:
    """The place of every tensor of a model, by Hugging Face's name."""
    import gguf

    architecture = gguf.MODEL_ARCH[MEANINGS[config.raw["model_type"]].architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    found = {}
    state = nnx.split(abstract_model(config, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32)))[1]
    for row in leaf_mappings(state, config):
        generic = [str(part) for part in row.path if not isinstance(part, int)]
        for number, name in enumerate(row.names):
            layer = name.split(".")[2] if row.stack else None
            stem = ".".join(
                generic[:-1] if layer is None else [*generic[:2], layer, *generic[2:-1]]
            )
            theirs = names.get_name(stem)
            assert theirs is not None, stem
            expert = number % row.stack[1] if len(row.stack) == 2 else None
            found[name] = TensorLocation(f"{theirs}.{generic[-1]}", expert)
    return found


def _undone(
    tensor: LazyTensor, name: str, place: TensorLocation, meaning: Meaning, config: ModelConfig
) -> LazyTensor:
    """The tensor as Hugging Face stores it."""
    if place.expert is not None:
        return _part(tensor, place.expert)
    if meaning.interleaved and ".q_proj." in name:
        return half_split(tensor, config.num_heads)
    if meaning.interleaved and ".k_proj." in name:
        return half_split(tensor, config.num_kv_heads)
    if meaning.norm_offset and name.endswith("norm.weight"):
        return LazyTensor(
            tensor.shape,
            tensor.dtype,
            lambda index: tensor.read(index) - tensor.dtype.type(meaning.norm_offset),
        )
    return tensor


def done(tensor: LazyTensor, name: str, config: ModelConfig) -> LazyTensor:
    """The tensor as llama.cpp stores it, but for its dtype; what `tensors` undoes."""
    meaning = MEANINGS[config.raw["model_type"]]
    if meaning.interleaved and ".q_proj." in name:
        return interleaved(tensor, config.num_heads)
    if meaning.interleaved and ".k_proj." in name:
        return interleaved(tensor, config.num_kv_heads)
    if meaning.norm_offset and name.endswith("norm.weight"):
        wide = tensor.astype(np.dtype("float32"))
        return LazyTensor(
            wide.shape, wide.dtype, lambda index: wide.read(index) + np.float32(meaning.norm_offset)
        )
    return tensor


def round_trip(
    tensors: Tensors, config: ModelConfig, stored: Callable[[LazyTensor, str], LazyTensor]
) -> Tensors:
    """What `tensors` would read from a file with these tensors, `stored` being the rounding to
    what each is kept in.
    """
    meaning, found = MEANINGS[config.raw["model_type"]], {}
    for name, tensor in tensors.items():
        kept = stored(done(tensor, name, config), name)
        found[name] = _undone(kept, name, TensorLocation(name), meaning, config)
    return found


def _part(tensor: LazyTensor, expert: int) -> LazyTensor:
    def read(index: Index) -> np.ndarray:
        inner = index or tuple(slice(None) for _ in tensor.shape[1:])
        return tensor.read((slice(expert, expert + 1), *inner))[0]

    return LazyTensor(tensor.shape[1:], tensor.dtype, read, tensor.quantized)


def _rope(file: GGUF, found: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json that say how positions are rotated."""
    theta = _short(found.get("rope.freq_base", 10000.0))
    options = _scaling(file, found, config, theta)
    if config["model_type"] == "gemma3_text":
        return {"rope_theta": theta, "rope_local_base_freq": 10000.0, "rope_scaling": options}
    if config["model_type"] == "phi3":
        share = found.get("rope.dimension_count", config["head_dim"]) / config["head_dim"]
        context = found.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        return {
            "rope_parameters": {"rope_theta": theta, "partial_rotary_factor": share, **options},
            "original_max_position_embeddings": context,
        }
    if found.get("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise UserError(
            f"{file.path}: rotary embeddings over a part of a head are not supported for "
            f"{config['model_type']}."
        )
    return {"rope_parameters": {"rope_theta": theta, **options}}


def _scaling(
    file: GGUF, found: dict[str, Any], config: dict[str, Any], theta: float
) -> dict[str, Any]:
    kind = found.get("rope.scaling.type", "none")
    if "rope_factors_long.weight" in file.tensors:
        long, short = (
            file.tensors[f"rope_factors_{size}.weight"].all().tolist() for size in ("long", "short")
        )
        options = {
            "rope_type": "longrope",
            "long_factor": [_short(x) for x in long],
            "short_factor": [_short(x) for x in short],
        }
        factor = found.get("rope.scaling.attn_factor")
        return options | ({} if factor is None else {"attention_factor": _short(factor)})
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, config["head_dim"], theta)
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": _short(found["rope.scaling.factor"])}
    if kind == "yarn":
        options = {"factor": _short(found["rope.scaling.factor"])}
        if length := found.get("rope.scaling.original_context_length"):
            options["original_max_position_embeddings"] = length
        return {"rope_type": "yarn", **options}
    raise UserError(f"{file.path}: rope scaling {kind!r} is not supported.")


def _llama3(file: GGUF, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's numbers from the divisors of every frequency, which is all that the format keeps
    of them.
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
    """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
