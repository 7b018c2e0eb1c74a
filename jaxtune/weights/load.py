"""From a source to a model on the devices, tensor by tensor: no second copy of the weights."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.selection import Selection
from jaxtune.core.dtypes import compute_dtype, storage_dtype
from jaxtune.core.errors import UserError, listed
from jaxtune.core.sharding import axis_size, sharding
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import CausalLM, abstract_model
from jaxtune.models.families.from_hf import from_hf
from jaxtune.models.kernels.quantized import QuantizedTensor
from jaxtune.models.layers import Linear
from jaxtune.models.moe import ExpertLinear
from jaxtune.weights.finite import FiniteChecks
from jaxtune.weights.mapping import LeafMapping, check_tensors, leaf_mappings
from jaxtune.weights.quantize import KINDS, check_quantizable, quantize, quantized_shapes
from jaxtune.weights.source import Source
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_ALIGNMENT = 64
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FEW = 8  # layers too many that are named one by one


def load_model(
    source: Source,
    mesh: Mesh,
    *,
    dtype: str = "auto",
    compute: str = "auto",
    trainable: tuple[str, ...] = (),
    layer_boundaries: tuple[int, ...] = (),
    shapes: bool = False,
) -> CausalLM:
    """Return the model with its weights sharded over the mesh.

    Args:
        source: the resolved model.
        mesh: where the weights go.
        dtype: storage of the weights; auto keeps the file's; int8 and nf4 quantize the matrices of
            the blocks, one by one.
        compute: dtype of activations and matrix products.
        trainable: which weights train, and so are float32 leaves of their own; see
            `adapters.selection`.
        layer_boundaries: further layers at which stacks are split, because adapters begin or end
            there.
        shapes: only return shapes, dtypes and shardings as leaves, and read nothing.

    Raises:
        UserError: an unsupported architecture, missing, unexpected or misshapen tensors, numbers
            that are not finite, or matrices that cannot be quantized.

    """
    config, tensors = check_source(source)
    selection = Selection(trainable, config.num_layers)
    selection.check(tensors)
    config = replace(
        config,
        vocab_padding=-config.vocab_size % axis_size(mesh, "vocab"),
        layer_boundaries=(*layer_boundaries, *selection.layer_boundaries(tensors)),
    )
    graph, state = nnx.split(abstract_model(config, jnp.dtype(jnp.float32), compute_dtype(compute)))
    matrices = _block_matrices(graph, state) if dtype in KINDS else set()
    leaves: dict[tuple[Any, ...], Any] = dict(nnx.to_flat_state(state))
    with FiniteChecks(source.path) as checks:
        read = _shape if shapes else partial(_read, checks=checks)
        read_quantized = _shape_quantized if shapes else partial(_read_quantized, checks=checks)
        for row in leaf_mappings(state, config):
            axes = leaves[row.path].get_metadata()["axes"]
            trains = {selection.trains(name) for name in row.names}
            if len(trains) > 1:
                raise UserError(
                    f"trainable: {listed(trainable)} selects some of a layer's experts. "
                    "Select all of them or none."
                )
            if True in trains:
                value = read(row, tensors, mesh, axes, "float32")
                leaves[row.path] = nnx.Param(value, axes=axes, trained=True)
            elif row.path in matrices:
                check_quantizable(row.names[0], row.shape, dtype)
                leaves[row.path] = nnx.Param(
                    read_quantized(row, tensors, mesh, axes, dtype), axes=axes
                )
            else:
                kept = "auto" if dtype in KINDS else dtype
                leaves[row.path] = leaves[row.path].replace(read(row, tensors, mesh, axes, kept))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _block_matrices(graph: nnx.GraphDef, state: nnx.State) -> set[tuple[Any, ...]]:
    """Return the paths of the blocks' matrices, those of experts among them."""
    model = nnx.merge(graph, state)
    return {
        (*path, "weight")
        for path, module in nnx.iter_modules(model)
        if "layers" in path and isinstance(module, Linear | ExpertLinear)
    }


def check_source(source: Source) -> tuple[ModelConfig, Tensors]:
    """Return the architecture, and exactly the tensors that it has, unread.

    Raises:
        UserError: an unsupported architecture, or missing, unexpected or misshapen tensors.

    """
    config = from_hf(source.config_json(), str(source.config_path))
    tensors = source.tensors()
    _check_layers(config, tensors, source)
    state = nnx.split(abstract_model(config, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32)))[1]
    table = leaf_mappings(state, config)
    check_tensors(table, tensors, str(source.path), config.tie_embeddings)
    names = {name for row in table for name in row.names}
    return config, {name: tensor for name, tensor in tensors.items() if name in names}


def _check_layers(config: ModelConfig, tensors: Tensors, source: Source) -> None:
    """Check the number of layers before a model of that size is laid out."""
    numbers = map(_LAYER.match, tensors)
    layers = len({number[1] for number in numbers if number})
    if layers and config.num_layers > 2 * layers + _FEW:
        raise UserError(
            f"{source.config_path}: num_hidden_layers is {config.num_layers}, and the weights have "
            f"{layers} layers. Download the model again."
        )


def _read(
    row: LeafMapping,
    tensors: Tensors,
    mesh: Mesh,
    axes: tuple[str | None, ...],
    dtype: str,
    *,
    checks: FiniteChecks,
) -> jax.Array:
    leaf = _shape(row, tensors, mesh, axes, dtype)
    parts = [_with_padding(tensors[name], row.shape) for name in row.names]
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, partial(_part, row, parts, leaf.dtype, checks)
    )


def _shape(
    row: LeafMapping, tensors: Tensors, mesh: Mesh, axes: tuple[str | None, ...], dtype: str
) -> Any:
    """Return the shape, dtype and sharding of a leaf."""
    parts = [tensors[name] for name in row.names]
    with jax.numpy_dtype_promotion("standard"):  # a stack has the least dtype that holds its layers
        file_dtype = np.dtype(jnp.result_type(*{part.dtype for part in parts}))
    stored = storage_dtype(dtype, file_dtype, any(part.quantized for part in parts))
    shape = (*row.stack, *row.shape)
    return jax.ShapeDtypeStruct(shape, stored, sharding=sharding(mesh, axes, shape))


def _read_quantized(
    row: LeafMapping,
    tensors: Tensors,
    mesh: Mesh,
    axes: tuple[str | None, ...],
    kind: str,
    *,
    checks: FiniteChecks,
) -> QuantizedTensor:
    def read(name: str) -> np.ndarray:
        values = tensors[name].all()
        checks.now(name, tensors[name], values)
        return values

    return quantize(map(read, row.names), row.stack, axes, mesh, kind)


def _shape_quantized(
    row: LeafMapping, tensors: Tensors, mesh: Mesh, axes: tuple[str | None, ...], kind: str
) -> QuantizedTensor:
    return quantized_shapes(row.shape, row.stack, axes, mesh, kind)


def _part(
    row: LeafMapping,
    parts: list[LazyTensor],
    dtype: np.dtype,
    checks: FiniteChecks,
    index: Index | None,
) -> np.ndarray:
    """Return the part of a leaf that a device holds, read from the tensors that make it up."""
    assert index is not None
    depth = len(row.stack)
    inner = index[depth:]
    numbers = np.arange(len(parts)).reshape(row.stack)[index[:depth]]
    extent = tuple(len(range(size)[part]) for size, part in zip(row.shape, inner, strict=True))
    out = _aligned((numbers.size, *extent), dtype)
    for place, number in enumerate(numbers.reshape(-1)):
        with np.errstate(over="ignore"):  # what became infinite is found below
            out[place] = parts[number].read(inner)
        checks.later(row.names[number], parts[number], out[place])
    return out.reshape(*numbers.shape, *extent)


def _with_padding(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Return the tensor, its last row repeated where the model has more rows than the file."""
    if tensor.shape == shape:
        return tensor

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        rows = tensor.read(
            (slice(min(start, tensor.shape[0] - 1), min(stop, tensor.shape[0])), *index[1:])
        )
        return np.concatenate([rows, np.repeat(rows[-1:], stop - start - len(rows), axis=0)])

    return LazyTensor(shape, tensor.dtype, read, tensor.quantized, tensor.file)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an empty array, aligned so that JAX on the CPU adopts it instead of copying it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    whole = np.empty(size + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    return whole[start : start + size].view(dtype).reshape(shape)
