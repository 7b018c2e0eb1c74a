"""Writing a GGUF file through the `gguf` package: metadata and tokenizer, then tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import ModelConfig, RopeConfig
from jaxtune.models.families.from_hf import from_hf, setting
from jaxtune.weights.formats.gguf.models import MEANINGS, done, places
from jaxtune.weights.tensors import LazyTensor, Tensors

# What large matrices may be stored in, by the name a user gives.
FORMATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0"}
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
        name: the model's, for people.
        dtype: of the matrices, a key of FORMATS; vectors and routers are float32, as llama.cpp
            wants them.

    Raises:
        UserError: the format has no place for something in the model.

    """
    import gguf

    config = from_hf(config_json, str(path))
    check_expressible(config)
    writer = gguf.GGUFWriter(
        path,
        gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[MEANINGS[config.raw["model_type"]].architecture]],
    )
    for key, value in {"general.name": name, **_metadata(config, writer.arch), **tokenizer}.items():
        _add(writer, key, value)
    jobs = list(_jobs(tensors, config, dtype))
    for target, _, shape, form in jobs:
        block, size = gguf.GGML_QUANT_SIZES[form]
        nbytes = int(np.prod(shape, dtype=np.int64)) // block * size
        plain = {"F32": np.float32, "F16": np.float16}.get(form.name)
        stored = shape if plain else (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(
            target, stored, np.dtype(plain or np.uint8), nbytes, raw_dtype=None if plain else form
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, read, _, form in jobs:
        writer.write_tensor_data(_encoded(read(), form))
    writer.close()


def check_expressible(config: ModelConfig) -> None:
    """What is known not to fit; the rest shows when the file is read back.

    Raises:
        UserError: the format has no place for something in the model.

    """
    kind = config.raw["model_type"]
    if MEANINGS[kind].architecture == "LLAMA" and any(layer.window for layer in config.layers):
        raise UserError(
            f"GGUF has no place for the sliding window of {kind}. If no text is longer than it, "
            "set "
            "sliding_window to null in config.json."
        )
    if odd := [rope.kind for rope in config.ropes if rope.kind not in _ROPE_KINDS]:
        raise UserError(f"GGUF has no place for rope_type {listed(odd)}.")


def stored(tensor: LazyTensor, name: str, dtype: str) -> LazyTensor:
    """A tensor as it will be read back from the file: rounded to what it is stored in."""
    form = _format(name, tensor.shape, dtype)
    if form.name in ("F32", "F16"):
        return tensor.astype(np.dtype("float16" if form.name == "F16" else "float32"))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        import gguf

        rows = tensor.read((index[0], *(slice(0, size) for size in tensor.shape[1:])))
        return gguf.quants.dequantize(_encoded(rows, form), form)[(slice(None), *index[1:])]

    return LazyTensor(tensor.shape, np.dtype("float32"), read)


def _format(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    import gguf

    if len(shape) == 1 or name.endswith((".mlp.gate.weight", "block_sparse_moe.gate.weight")):
        return gguf.GGMLQuantizationType.F32
    form = gguf.GGMLQuantizationType[FORMATS[dtype]]
    return (
        form if shape[-1] % gguf.GGML_QUANT_SIZES[form][0] == 0 else gguf.GGMLQuantizationType.F16
    )


def _encoded(values: np.ndarray, form: Any) -> np.ndarray:
    import gguf

    if form.name in ("F32", "F16"):
        return np.ascontiguousarray(values.astype(np.float32 if form.name == "F32" else np.float16))
    return gguf.quants.quantize(np.ascontiguousarray(values.astype(np.float32)), form)


def _jobs(
    tensors: Tensors, config: ModelConfig, dtype: str
) -> Iterator[tuple[str, Any, tuple[int, ...], Any]]:
    """`(llama.cpp's name, how to read it, shape, format)` of every tensor; a layer's experts are
    one.
    """
    together: dict[str, list[str]] = {}
    experts = set()
    for name, place in places(config).items():
        together.setdefault(place.name, []).append(name)
        if place.expert is not None:
            experts.add(place.name)
    for target, names in together.items():
        parts = [done(tensors[name], name, config) for name in names]
        shape = (len(parts), *parts[0].shape) if target in experts else parts[0].shape
        form = _format(names[0], parts[0].shape, dtype)
        whole = (
            (lambda parts=parts: np.stack([part.all() for part in parts]))
            if target in experts
            else parts[0].all
        )
        yield target, whole, shape, form
    for target, values in _rope_tensors(config).items():
        yield (
            target,
            lambda values=values: values,
            values.shape,
            _format(target, values.shape, dtype),
        )


def _metadata(config: ModelConfig, architecture: str) -> dict[str, Any]:
    rope = config.ropes[0]
    found: dict[str, Any] = {
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
        found |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.get("factor"))}
    if length := rope.get("original_max_position_embeddings") or config.raw.get(
        "original_max_position_embeddings"
    ):
        found["rope.scaling.original_context_length"] = length
    if rope.kind == "longrope" and rope.get("attention_factor") is not None:
        found["rope.scaling.attn_factor"] = float(rope.get("attention_factor"))
    for theirs, ours in MEANINGS[config.raw["model_type"]].keys.items():
        if (value := setting(config.raw, ours)) is not None:
            found[theirs] = float(value) if theirs in _FLOATS else value
    if config.experts:
        found |= {"expert_count": config.experts.count, "expert_used_count": config.experts.chosen}
    return {f"{architecture}.{key}": value for key, value in found.items()}


_FLOATS = {
    "attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "embedding_scale",
    "residual_scale", "logit_scale",
}  # fmt: skip


def _rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """The divisors of frequencies, which the format keeps as tensors."""
    rope = config.ropes[0]
    if rope.kind == "longrope":
        return {
            f"rope_factors_{size}.weight": np.asarray(rope.get(f"{size}_factor"), np.float32)
            for size in ("long", "short")
        }
    return (
        {"rope_freqs.weight": _llama3_divisors(rope, config.head_dim)}
        if rope.kind == "llama3"
        else {}
    )


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
