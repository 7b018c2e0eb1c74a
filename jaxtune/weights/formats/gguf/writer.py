"""Write a GGUF file through the `gguf` package: metadata and tokenizer, then tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import ModelConfig
from jaxtune.models.families.from_hf import from_hf, read_setting
from jaxtune.weights.formats.gguf.models import (
    GGUF_FAMILIES,
    GGUFFamily,
    tensor_locations,
    to_llama_cpp,
)
from jaxtune.weights.formats.gguf.quantize import FILE_TYPES, encode, stored_type
from jaxtune.weights.formats.gguf.rope import rope_metadata, rope_tensors, unexpressed_options
from jaxtune.weights.tensors import Index, LazyTensor, Tensors


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
        dtype: of the matrices, a key of `quantize.MATRIX_TYPES`; vectors and routers are float32,
            as llama.cpp wants them.

    Raises:
        UserError: the format has no place for something in the model.

    """
    import gguf

    config = from_hf(config_json, str(path))
    check_expressible(config)
    architecture = GGUF_FAMILIES[config.raw["model_type"]].architecture
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    general = {"general.name": name, "general.file_type": FILE_TYPES[dtype]}
    for key, value in {**general, **_metadata(config, writer.arch), **tokenizer}.items():
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
        writer.write_tensor_data(encode(entry.read(), entry.stored_as))
    writer.close()


def check_expressible(config: ModelConfig) -> None:
    """Refuse what llama.cpp cannot load, or would compute otherwise.

    What it reads of a family is in the code of each (llama.cpp, src/models); that it computes the
    same from what is written is tested in llama.cpp itself.

    Raises:
        UserError: the format, or llama.cpp, has no place for something in the model.

    """
    kind = config.raw["model_type"]
    if kind not in GGUF_FAMILIES:
        raise UserError(f"GGUF export of {kind} is not supported. Export it with --to hf.")
    if reason := _reason_against(config, GGUF_FAMILIES[kind], kind):
        raise UserError(f"GGUF: {reason}")


def _reason_against(config: ModelConfig, family: GGUFFamily, kind: str) -> str | None:
    """Return why llama.cpp would not compute this model; None where it would."""
    elsewhere = "Export it with --to hf."
    window = min((layer.window for layer in config.layers if layer.window), default=None)
    if window and not family.windows and not (kind == "phi3" and window >= config.max_positions):
        return (
            f"llama.cpp has no place for the sliding window of {kind}. If no text is longer than "
            "it, set sliding_window to null in config.json."
        )
    rope = config.ropes[0]
    if rope.kind not in family.ropes:
        return f"llama.cpp has no rope_type {rope.kind} for {kind}. {elsewhere}"
    if any(local.kind != "default" for local in config.ropes[1:]):
        return f"llama.cpp does not stretch the positions of layers with a window. {elsewhere}"
    if options := unexpressed_options(rope):
        return f"llama.cpp has no place for {listed(options)} of rope_type {rope.kind}. {elsewhere}"
    if (config.o_bias or config.mlp_bias) and not family.biases:
        name = "attention_bias" if config.o_bias else "mlp_bias"
        return f"llama.cpp has no place for {name} of {kind}. {elsewhere}"
    width = config.num_heads * config.head_dim
    if family.square_attention and width != config.hidden_size:
        return (
            f"llama.cpp wants num_attention_heads times head_dim ({width}) to be hidden_size "
            f"({config.hidden_size}) for {kind}. {elsewhere}"
        )
    if family.head == "own" and config.tie_embeddings:
        return f"llama.cpp wants a head apart from the embedding for {kind}. {elsewhere}"
    if family.head == "tied" and not config.tie_embeddings:
        return (
            f"llama.cpp has no head apart from the embedding for {kind}. Train without the head, "
            "or export it with --to hf."
        )
    if config.experts and not all(layer.sparse for layer in config.layers):
        return f"llama.cpp wants experts in every layer of {kind}. {elsewhere}"
    if kind == "gemma2" and None in (config.attention_softcap, config.logit_softcap):
        return f"llama.cpp cannot leave out the soft-caps of {kind}. {elsewhere}"
    return None


def as_stored(tensor: LazyTensor, name: str, dtype: str, config: ModelConfig) -> LazyTensor:
    """Return a tensor as it will be read back: rounded to the type that the file stores it in."""
    stored_as = stored_type(name, tensor.shape, dtype, config)
    if stored_as.name in ("F32", "F16"):
        return tensor.astype(np.dtype("float16" if stored_as.name == "F16" else "float32"))

    def read(index: Index) -> np.ndarray:
        import gguf

        rows = tensor.read((index[0], *(slice(0, size) for size in tensor.shape[1:])))
        values = gguf.quants.dequantize(encode(rows, stored_as), stored_as)
        return values[(slice(None), *index[1:])]

    return LazyTensor(tensor.shape, np.dtype("float32"), read)


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
        stored_as = stored_type(names[0], parts[0].shape, dtype, config)
        if target in expert_stacks:
            shape = (len(parts), *parts[0].shape)
            yield _Entry(target, partial(_stacked, parts), shape, stored_as)
        else:
            yield _Entry(target, parts[0].all, parts[0].shape, stored_as)
    for target, values in rope_tensors(config).items():
        stored_as = stored_type(target, values.shape, dtype, config)
        yield _Entry(target, partial(np.asarray, values), values.shape, stored_as)


def _stacked(parts: list[LazyTensor]) -> np.ndarray:
    return np.stack([part.all() for part in parts])


def _metadata(config: ModelConfig, architecture: str) -> dict[str, Any]:
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
        **rope_metadata(config),
    }
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
