"""Checkpoints of all that changes: step, trainable leaves, optimizer state, random key. Written while training goes on."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.train.step import TrainState

DIRECTORY = "checkpoints"


class Checkpoints:
    """The checkpoints of a run directory.

    Args:
        directory: the run directory.
        keep: how many stay; older ones are removed when a newer one is whole.

    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((directory / DIRECTORY).resolve(), options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint; the state may be donated to the next step at once."""
        step = int(state.step)
        if step != self.latest:
            self._manager.save(step, args=self._ocp.args.StandardSave(_flatten(state)))

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, laid out like `like`.

        Raises:
            UserError: its leaves are not those of this run.

        """
        flat = _flatten(like)
        abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in flat.items()}
        try:
            found = self._manager.restore(self.latest, args=self._ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"The checkpoint of step {self.latest} does not fit this configuration: {reason}") from None
        if found.keys() != flat.keys():
            raise UserError(
                f"The checkpoint of step {self.latest} has other leaves: {listed(sorted(found.keys() ^ flat.keys()))}."
            )
        leaves = [found[name] for name in flat]
        restored = jax.tree.unflatten(jax.tree.structure(_without_key(like)), leaves[:-1])
        return restored._replace(key=jax.random.wrap_key_data(leaves[-1]))

    def wait(self) -> None:
        """Block until what is being written is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the directory."""
        self._manager.close()


def steps_saved(directory: Path) -> list[int]:
    """Steps of the whole checkpoints of a run directory, in order, without opening them."""
    folder = directory / DIRECTORY
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def _without_key(state: TrainState) -> TrainState:
    return state._replace(key=None)


def _flatten(state: TrainState) -> dict[str, Any]:
    """Leaves by name, in the tree's order, the key's numbers last."""
    leaves, _ = jax.tree.flatten_with_path(_without_key(state))
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    flat["key"] = jax.random.key_data(state.key)
    return {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in flat.items()}
