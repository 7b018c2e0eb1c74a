"""Write a GGUF file through the `gguf` package: metadata and tokenizer, then tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import ModelConfig, RopeConfig
from jaxtune.models.families.from_hf import from_hf, read_setting
from jaxtune.weights.formats.gguf.models import GGUF_FAMILIES, tensor_locations, to_llama_cpp
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

# The types that large matrices may be stored in, by the name a user gives.
MATRIX_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0"}
_ROPE_KINDS = ("default", "linear", "yarn", "llama3", "longrope")


def write_gguf(
    path: Path,
    tensors: Tensors,
    config_json: dict[str, Any],
    tokenizer: dict[str, Any],
    name: str,
    dtype: str,
) -> None:
    """Write a model as one GGUF file.

    Args:
        path: the file.
        tensors: all weights, by Hugging Face's names.
        config_json: the model's.
        tokenizer: the file's `tokenizer.` metadata; may be empty.
        name: the model's, shown to people.
        dtype: of the matrices, a key of MATRIX_TYPES; vectors and routers are float32, as
            llama.cpp wants them.

    Raises:
        UserError: the format has no place for something in the model.

    """
    import gguf

    config = from_hf(config_json, str(path))
    check_expressible(config)
    architecture = GGUF_FAMILIES[config.raw["model_type"]].architecture
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    for key, value in {"general.name": name, **_metadata(config, writer.arch), **tokenizer}.items():
        _add(writer, key, value)
    entries = list(_entries(tensors, config, dtype))
    for entry in entries:
        shape, stored_as = entry.shape, entry.stored_as
        block, size = gguf.GGML_QUANT_SIZES[stored_as]
        nbytes = int(np.prod(shape, dtype=np.int64)) // block * size
        plain = {"F32": np.float32, "F16": np.float16}.get(stored_as.name)
        writer.add_tensor_info(
            entry.name,
            shape if plain else (*shape[:-1], shape[-1] // block * size),
            np.dtype(plain or np.uint8),
            nbytes,
            raw_dtype=None if plain else stored_as,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_encode(entry.read(), entry.stored_as))
    writer.close()


def check_expressible(config: ModelConfig) -> None:
    """Refuse what is known not to fit; the rest shows when the file is read back.

    Raises:
        UserError: the format has no place for something in the model.

    """
    kind = config.raw["model_type"]
    if kind not in GGUF_FAMILIES:
        raise UserError(f"GGUF export of {kind} is not supported. Export it with --to hf.")
    if GGUF_FAMILIES[kind].architecture == "LLAMA" and any(layer.window for layer in config.layers):
        raise UserError(
            f"GGUF has no place for the sliding window of {kind}. If no text is longer than it, "
            "set sliding_window to null in config.json."
        )
    if odd := [rope.kind for rope in config.ropes if rope.kind not in _ROPE_KINDS]:
        raise UserError(f"GGUF has no place for rope_type {listed(odd)}.")


def as_stored(tensor: LazyTensor, name: str, dtype: str) -> LazyTensor:
    """Return a tensor as it will be read back: rounded to the type that the file stores it in."""
    stored_as = _stored_type(name, tensor.shape, dtype)
    if stored_as.name in ("F32", "F16"):
        return tensor.astype(np.dtype("float16" if stored_as.name == "F16" else "float32"))

    def read(index: Index) -> np.ndarray:
        import gguf

        rows = tensor.read((index[0], *(slice(0, size) for size in tensor.shape[1:])))
        values = gguf.quants.dequantize(_encode(rows, stored_as), stored_as)
        return values[(slice(None), *index[1:])]

    return LazyTensor(tensor.shape, np.dtype("float32"), read)


def _stored_type(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Return the `gguf.GGMLQuantizationType` of a tensor."""
    import gguf

    if len(shape) == 1 or name.endswith((".mlp.gate.weight", "block_sparse_moe.gate.weight")):
        return gguf.GGMLQuantizationType.F32
    stored_as = gguf.GGMLQuantizationType[MATRIX_TYPES[dtype]]
    block = gguf.GGML_QUANT_SIZES[stored_as][0]
    return stored_as if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _encode(values: np.ndarray, stored_as: Any) -> np.ndarray:
    import gguf

    if stored_as.name in ("F32", "F16"):
        dtype = np.float32 if stored_as.name == "F32" else np.float16
        return np.ascontiguousarray(values.astype(dtype))
    return gguf.quants.quantize(np.ascontiguousarray(values.astype(np.float32)), stored_as)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: llama.cpp's name, how to read it, and the type it is stored in."""

    name: str
    read: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    stored_as: Any


def _entries(tensors: Tensors, config: ModelConfig, dtype: str) -> Iterator[_Entry]:
    """Yield every tensor of the file; the experts of a layer are one."""
    sources: dict[str, list[str]] = {}
    expert_stacks = set()
    for name, location in tensor_locations(config).items():
        sources.setdefault(location.name, []).append(name)
        if location.expert is not None:
            expert_stacks.add(location.name)
    for target, names in sources.items():
        parts = [to_llama_cpp(tensors[name], name, config) for name in names]
        stored_as = _stored_type(names[0], parts[0].shape, dtype)
        if target in expert_stacks:
            shape = (len(parts), *parts[0].shape)
            yield _Entry(target, partial(_stacked, parts), shape, stored_as)
        else:
            yield _Entry(target, parts[0].all, parts[0].shape, stored_as)
    for target, values in _rope_tensors(config).items():
        stored_as = _stored_type(target, values.shape, dtype)
        yield _Entry(target, partial(np.asarray, values), values.shape, stored_as)


def _stacked(parts: list[LazyTensor]) -> np.ndarray:
    return np.stack([part.all() for part in parts])


def _metadata(config: ModelConfig, architecture: str) -> dict[str, Any]:
    rope = config.ropes[0]
    metadata: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm.eps,
        "vocab_size": config.vocab_size,
        "rope.freq_base": rope.theta,
        "rope.dimension_count": int(config.head_dim * rope.partial),
    }
    if rope.kind in ("linear", "yarn"):
        metadata["rope.scaling.type"] = rope.kind
        metadata["rope.scaling.factor"] = float(rope.get("factor"))
    length_key = "original_max_position_embeddings"
    if length := rope.get(length_key) or config.raw.get(length_key):
        metadata["rope.scaling.original_context_length"] = length
    if rope.kind == "longrope" and rope.get("attention_factor") is not None:
        metadata["rope.scaling.attn_factor"] = float(rope.get("attention_factor"))
    for gguf_key, hf_key in GGUF_FAMILIES[config.raw["model_type"]].keys.items():
        if (value := read_setting(config.raw, hf_key)) is not None:
            metadata[gguf_key] = float(value) if gguf_key in _FLOATS else value
    if config.experts:
        metadata["expert_count"] = config.experts.count
        metadata["expert_used_count"] = config.experts.per_token
    return {f"{architecture}.{key}": value for key, value in metadata.items()}


_FLOATS = {
    "attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "embedding_scale",
    "residual_scale", "logit_scale",
}  # fmt: skip


def _rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the frequency divisors, which the format keeps as tensors."""
    rope = config.ropes[0]
    if rope.kind == "longrope":
        return {
            f"rope_factors_{size}.weight": np.asarray(rope.get(f"{size}_factor"), np.float32)
            for size in ("long", "short")
        }
    if rope.kind == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, config.head_dim)}
    return {}


def _llama3_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    plain = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    turns = rope.get("original_max_position_embeddings") * plain / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / rope.get("factor") + blend)).astype(np.float32)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)
