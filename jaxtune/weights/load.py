"""From a source to a model on the devices, tensor by tensor; no second copy of the weights exists."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.core.axes import sharding, vocab_parts
from jaxtune.core.dtypes import compute_dtype, storage_dtype
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import CausalLM, abstract_model
from jaxtune.models.families import from_hf
from jaxtune.weights.rows import Row, check, rows
from jaxtune.weights.source import Source
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_ALIGNMENT = 64


def load_model(source: Source, mesh: Mesh, *, dtype: str = "auto", compute: str = "auto") -> CausalLM:
    """The model with its weights sharded over the mesh.

    Args:
        source: the resolved model.
        mesh: where the weights go.
        dtype: storage of the weights; auto keeps what the file has.
        compute: dtype of activations and matrix products.

    Raises:
        UserError: an unsupported architecture, or missing, unexpected or misshapen tensors.

    """
    config, tensors = checked(source)
    config = replace(config, vocab_padding=-config.vocab_size % vocab_parts(mesh))
    graph, state = nnx.split(abstract_model(config, jnp.dtype(jnp.float32), compute_dtype(compute)))
    table = rows(state, config)
    leaves: dict[tuple[Any, ...], Any] = dict(nnx.to_flat_state(state))
    for row in table:
        variable = leaves[row.path]
        leaves[row.path] = variable.replace(_read(row, tensors, mesh, variable.get_metadata()["axes"], dtype))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def checked(source: Source) -> tuple[ModelConfig, Tensors]:
    """The architecture, and exactly the tensors that it has, unread.

    Raises:
        UserError: an unsupported architecture, or missing, unexpected or misshapen tensors.

    """
    config = from_hf(source.config_json(), str(source.config_path))
    state = nnx.split(abstract_model(config, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32)))[1]
    tensors, table = source.tensors(), rows(state, config)
    check(table, tensors, str(source.path), config.tie_embeddings)
    names = {name for row in table for name in row.names}
    return config, {name: tensor for name, tensor in tensors.items() if name in names}


def _read(row: Row, tensors: Tensors, mesh: Mesh, axes: tuple[str | None, ...], dtype: str) -> jax.Array:
    parts = [_with_padding(tensors[name], row.shape) for name in row.names]
    with jax.numpy_dtype_promotion("standard"):  # a stack of layers has one dtype: the least that holds them all
        found = np.dtype(jnp.result_type(*{part.dtype for part in parts}))
    stored = storage_dtype(dtype, found, any(part.quantised for part in parts))
    shape = (*row.stack, *row.shape)
    return jax.make_array_from_callback(shape, sharding(mesh, axes, shape), partial(_part, row, parts, stored))


def _part(row: Row, parts: list[LazyTensor], dtype: np.dtype, index: Index | None) -> np.ndarray:
    """The part of a leaf that a device holds, read from the tensors that make it up."""
    assert index is not None
    depth = len(row.stack)
    inner = index[depth:]
    chosen = np.arange(len(parts)).reshape(row.stack)[index[:depth]]
    extent = tuple(len(range(size)[part]) for size, part in zip(row.shape, inner, strict=True))
    out = _aligned((chosen.size, *extent), dtype)
    for place, number in enumerate(chosen.reshape(-1)):
        out[place] = parts[number].read(inner)
    return out.reshape(*chosen.shape, *extent)


def _with_padding(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """The tensor, with its last row again where the model has more rows than the file."""
    if tensor.shape == shape:
        return tensor

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        rows = tensor.read((slice(min(start, tensor.shape[0] - 1), min(stop, tensor.shape[0])), *index[1:]))
        return np.concatenate([rows, np.repeat(rows[-1:], stop - start - len(rows), axis=0)])

    return LazyTensor(shape, tensor.dtype, read, tensor.quantised)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins where JAX takes it over on the CPU instead of copying it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    whole = np.empty(size + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    return whole[start : start + size].view(dtype).reshape(shape)
