"""Weights as an orbax checkpoint: one array for every tensor, by Hugging Face's names."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import UserError
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

FOLDER = "orbax"


def write_directory(directory: Path, tensors: Tensors) -> None:
    """Write the checkpoint; its writer wants all tensors in memory."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as writer:
        writer.save(
            (directory / FOLDER).absolute(),
            {name: tensor.all() for name, tensor in tensors.items()},
        )


def open_directory(path: Path) -> Tensors:
    """The tensors of a checkpoint, none of them read yet.

    Raises:
        UserError: the folder is no whole checkpoint.

    """
    import orbax.checkpoint as ocp

    folder = (path / FOLDER).absolute()
    with ocp.PyTreeCheckpointer() as reader:
        try:
            found: Any = reader.metadata(folder).item_metadata
            shapes = {
                name: (tuple(entry.shape), np.dtype(entry.dtype))
                for name, entry in found.tree.items()
            }
        except (OSError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{folder} is not a whole orbax checkpoint ({reason}). Convert the model again."
            ) from None
    return {
        name: LazyTensor(shape, dtype, _reader(folder, name, shape, dtype))
        for name, (shape, dtype) in shapes.items()
    }


def _reader(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    def read(index: Index) -> np.ndarray:
        import orbax.checkpoint as ocp

        only = ocp.args.PyTreeRestore(
            {name: jax.ShapeDtypeStruct(shape, dtype)},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(folder, args=only)[name][index]

    return read
