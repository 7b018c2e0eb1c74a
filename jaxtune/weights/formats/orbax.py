"""Weights as an orbax checkpoint: one array for each tensor, by Hugging Face's names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import UserError, first_line
from jaxtune.weights.formats.format import DirectoryFormat, ModelDirectory
from jaxtune.weights.source import Source
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

FOLDER = "orbax"


class OrbaxDirectory(ModelDirectory):
    """A directory whose weights are an orbax checkpoint."""

    def tensors(self) -> Tensors:
        """See Source."""
        return open_weights(self.path)


class OrbaxFormat(DirectoryFormat):
    """An orbax checkpoint beside `config.json`."""

    name = "orbax"
    description = "A model as an orbax checkpoint, one array a tensor, by Hugging Face's names."
    needs = f"a directory with config.json and {FOLDER}/"

    def recognizes(self, path: Path) -> bool:
        """See ModelFormat."""
        return (path / "config.json").exists() and (path / FOLDER).is_dir()

    def open(self, path: Path, name: str) -> Source:
        """See ModelFormat."""
        return OrbaxDirectory(name, path)

    def write_weights(self, directory: Path, tensors: Tensors) -> None:
        """Write the checkpoint; orbax needs all tensors in memory."""
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as writer:
            writer.save(
                (directory / FOLDER).absolute(),
                {name: tensor.all() for name, tensor in tensors.items()},
            )


FORMAT = OrbaxFormat()


def open_weights(path: Path) -> Tensors:
    """Return the tensors of a checkpoint, unread.

    Raises:
        UserError: the checkpoint is damaged.

    """
    import orbax.checkpoint as ocp

    folder = (path / FOLDER).absolute()
    with ocp.PyTreeCheckpointer() as reader:
        try:
            metadata: Any = reader.metadata(folder).item_metadata
            shapes = {
                name: (tuple(entry.shape), np.dtype(entry.dtype))
                for name, entry in metadata.tree.items()
            }
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{folder} is not a whole orbax checkpoint ({first_line(error)}). "
                "Convert the model again."
            ) from None
    return {
        name: LazyTensor(shape, dtype, _reader(folder, name, shape, dtype))
        for name, (shape, dtype) in shapes.items()
    }


def _reader(
    folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Index], np.ndarray]:
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
