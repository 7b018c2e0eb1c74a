"""Weights of a Hugging Face directory: one `model.safetensors`, or many with an index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import read_json
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype(jnp.bfloat16)}


def open_directory(path: Path) -> Tensors:
    """The tensors of a model directory, none of them read yet.

    Args:
        path: a directory with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Raises:
        UserError: no weights, a shard that is missing or cut short, or an index that disagrees with its shards.

    """
    if (path / INDEX).exists():
        return _open_sharded(path)
    if not (path / SINGLE).exists():
        raise UserError(
            f"{path} holds no {SINGLE} and no {INDEX}. Save the model with save_pretrained(..., safe_serialization=True)."
        )
    return open_file(path / SINGLE)


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file, none of them read yet.

    Raises:
        UserError: the file is cut short or not safetensors, or holds a dtype other than a float of 16 bits or more.

    """
    try:
        file = safe_open(path, framework="np")
        return {name: _lazy(file, name, path) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Download or save it again.") from None


def _lazy(file: Any, name: str, path: Path) -> LazyTensor:
    part = file.get_slice(name)
    if part.get_dtype() not in _DTYPES:
        raise UserError(f"{path}: tensor {name} has dtype {part.get_dtype()}; supported are {listed(_DTYPES)}.")
    return LazyTensor(tuple(part.get_shape()), _DTYPES[part.get_dtype()], _reader(file, name))


def _reader(file: Any, name: str) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        return file.get_slice(name)[index] if index else file.get_tensor(name)

    return read


def _open_sharded(path: Path) -> Tensors:
    index = read_json(path / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{path / INDEX} has no weight_map from names to files. Download it again.")
    tensors: Tensors = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise UserError(f"{path / INDEX} names {file!r}, which is not a plain file name. Do not use this model.")
        if not (path / file).exists():
            raise UserError(f"{path / file}, named by {INDEX}, does not exist. Download it again.")
        tensors |= open_file(path / file)
    if missing := sorted(where.keys() - tensors.keys()):
        raise UserError(f"{path}: {INDEX} names tensors that its files do not hold: {listed(missing)}.")
    if extra := sorted(tensors.keys() - where.keys()):
        raise UserError(f"{path}: the files hold tensors that {INDEX} does not name: {listed(extra)}.")
    return tensors
