"""Checkpoints of all that changes: step, trainable leaves, optimizer state, random key, written
while training continues.
"""

import json
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxtune.config.schema import Config
from jaxtune.core import distributed
from jaxtune.core.errors import RunError, UserError, first_line, listed
from jaxtune.tracking.metrics_log import is_better
from jaxtune.tracking.ownership import write_whole
from jaxtune.tracking.record import checkpoint_directory
from jaxtune.training.state import TrainState

_SIZES, _BEST, _BAD, _RUN = "sizes", "best", "bad", "run"


class Checkpoints:
    """The checkpoints of a run.

    Beside every complete checkpoint the sizes of its files are kept, so that one truncated later is
    recognized.

    Args:
        directory: their directory, on disk or in an object store (`gs://`, `s3://`).
        keep: how many to keep; older ones are removed once a newer one is complete.
        warn: called with what is wrong with a checkpoint that is skipped.
        before: called before a checkpoint is written.
        run_id: the run's id, which every checkpoint carries; one of another run is refused.

    """

    def __init__(
        self,
        directory: Any,
        keep: int = 2,
        warn: Callable[[str], None] = print,
        before: Callable[[], None] | None = None,
        run_id: str | None = None,
    ) -> None:
        import orbax.checkpoint as ocp

        self._run_id = run_id
        self._ocp, self._warn, self._before, self.path = ocp, warn, before, epath.Path(directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(
            self.path, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    @property
    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint; the state may be donated to the next step at once.

        Raises:
            RunError: it, or the one before, cannot be written; earlier ones are complete.

        """
        step = int(state.step)
        if step == self.latest:
            return
        try:
            if self._before:
                self._before()
            self._note_sizes()
            self._manager.save(
                step,
                args=self._ocp.args.StandardSave(_flatten(state)),
                custom_metadata={_RUN: self._run_id} if self._run_id else None,
            )
        except Exception as error:
            raise self._unwritten(error) from error

    def restore(self, like: TrainState) -> TrainState:
        """Return the newest checkpoint that can be read, laid out like `like`; put aside those that
        cannot.

        Args:
            like: the state, as arrays or as shapes with shardings.

        Raises:
            UserError: its leaves are not those of this run, or no checkpoint can be read.

        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            wrong = distributed.broadcast_from_main(lambda step=step: self._wrong(step))
            if wrong is None:
                try:
                    return self._restored(step, like)
                except UserError:
                    raise
                except Exception as error:
                    if distributed.is_multiprocess():  # the others may have read their parts
                        where, why = self.path / str(step), first_line(error)
                        raise RunError(
                            f"{where} cannot be read: {why}. Remove it to continue from the one "
                            "before."
                        ) from None
                    wrong = first_line(error)
            self._put_aside(step, wrong)
        raise UserError(f"{self.path}: no checkpoint can be read. Start over with --fresh.")

    def _restored(self, step: int, like: TrainState) -> TrainState:
        self._check_run(step)
        flat = _flatten(like)
        self._check_leaves(step, flat)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in flat.items()
        }
        saved = self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
        leaves = [saved[name] for name in flat]
        restored = jax.tree.unflatten(jax.tree.structure(_without_key(like)), leaves[:-1])
        return restored._replace(key=jax.random.wrap_key_data(leaves[-1]))

    def _check_run(self, step: int) -> None:
        """Check that a checkpoint is of this run; those of earlier versions do not say whose.

        Raises:
            UserError: it is of another run.

        """
        metadata: Any = self._manager.metadata(step)
        other = (metadata.custom_metadata or {}).get(_RUN)
        if self._run_id is not None and other not in (None, self._run_id):
            raise UserError(
                f"{self.path / str(step)} is a checkpoint of another run. Move it away, or set "
                "checkpoint.dir to another directory."
            )

    def _check_leaves(self, step: int, flat: dict[str, Any]) -> None:
        """Check that a checkpoint has the leaves of this run.

        Raises:
            UserError: it has others.

        """
        metadata: Any = self._manager.item_metadata(step)
        saved = {name: tuple(leaf.shape) for name, leaf in metadata.items()}
        expected = {name: tuple(leaf.shape) for name, leaf in flat.items()}
        if saved.keys() != expected.keys():
            names = listed(sorted(saved.keys() ^ expected.keys()))
            raise UserError(f"The checkpoint of step {step} has other leaves: {names}.")
        if wrong := [name for name, shape in expected.items() if saved[name] != shape]:
            shapes = listed(
                f"{name} {list(saved[name])} instead of {list(expected[name])}" for name in wrong
            )
            raise UserError(
                f"The checkpoint of step {step} does not fit this configuration: {shapes}."
            )

    def _wrong(self, step: int) -> str | None:
        """Return what is wrong with the files of a checkpoint; None where nothing is, or where
        their sizes were not noted.
        """
        note = self.path / _SIZES / f"{step}.json"
        if not note.exists():
            return None
        try:
            noted, actual = json.loads(note.read_text()), _sizes(self.path / str(step))
        except (OSError, ValueError) as error:
            return first_line(error)
        bad = [name for name, size in noted.items() if actual.get(name) != size]
        return f"{listed(bad, 2)} missing or truncated" if bad else None

    def _put_aside(self, step: int, wrong: str) -> None:
        self._warn(
            f"WARNING: the checkpoint of step {step} cannot be used ({wrong}); going back to the "
            "one before."
        )
        if distributed.is_main():
            aside = self.path / _BAD / str(step)
            aside.parent.mkdir(parents=True, exist_ok=True)
            if aside.exists():
                aside.rmtree()
            (self.path / str(step)).rename(aside)
            # The sizes are not those of the checkpoint that will take its place.
            (self.path / _SIZES / f"{step}.json").unlink(missing_ok=True)
        distributed.barrier("put aside")
        self._manager.reload()

    def _note_sizes(self) -> None:
        """Note the sizes of the files of complete checkpoints, and of no others.

        Orbax's callback after a checkpoint comes before it has its name, so this is done when the
        next one begins and at the end.
        """
        if not distributed.is_main():
            return
        folder = self.path / _SIZES
        folder.mkdir(parents=True, exist_ok=True)
        steps = set(map(str, steps_in(self.path)))
        for step in steps:
            note = folder / f"{step}.json"
            if not note.exists():
                write_whole(note, json.dumps(_sizes(self.path / step)))
        for note in folder.iterdir():
            if note.name.removesuffix(".json") not in steps:
                note.unlink(missing_ok=True)

    def wait(self) -> None:
        """Block until what is being written is complete.

        Raises:
            RunError: it cannot be written.

        """
        try:
            self._manager.wait_until_finished()
            self._note_sizes()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Finish writing and release the directory."""
        self._manager.close()

    def _unwritten(self, error: Exception) -> RunError:
        last = max(steps_in(self.path), default=None)
        kept = "none was written before" if last is None else f"the one of step {last} is complete"
        return RunError(
            f"{self.path}: a checkpoint cannot be written: {first_line(error)}; {kept}. Make room "
            "or set checkpoint.dir, and start again."
        )


class Best:
    """The checkpoint with the best evaluation.

    Args:
        directory: the directory of the run's checkpoints.
        metric: the metric to compare; see `config.schema.lower_is_better`.
        warn: see `Checkpoints`.
        run_id: see `Checkpoints`.

    """

    def __init__(
        self,
        directory: Any,
        metric: str,
        warn: Callable[[str], None],
        run_id: str | None = None,
    ) -> None:
        self.metric, self._warn = metric, warn
        self._checkpoints = Checkpoints(epath.Path(directory) / _BEST, 1, warn, run_id=run_id)
        self._check_metric()

    @property
    def value(self) -> float | None:
        """Return the metric of the best state, or None before the first."""
        return self._evaluation().get(self.metric)

    @property
    def step(self) -> int | None:
        """Return the step of the best state, or None before the first."""
        return self._checkpoints.latest

    def offer(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Keep this state if it is better than the best so far."""
        if not is_better(metrics[self.metric], self.value, self.metric):
            return
        if distributed.is_main():
            self._noted(int(state.step)).parent.mkdir(parents=True, exist_ok=True)
            # As JSON has it: what is not finite is no metric to compare.
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            write_whole(self._noted(int(state.step)), json.dumps(finite))
        self._checkpoints.save(state)
        self._checkpoints.wait()

    def restore(self, like: TrainState) -> TrainState:
        """Return the best state."""
        return self._checkpoints.restore(like)

    def close(self) -> None:
        """Release the directory."""
        self._checkpoints.close()

    def _evaluation(self) -> dict[str, float]:
        """Return the metrics of the best state by name, {} before the first."""
        step = self._checkpoints.latest
        if step is None:
            return {}
        noted = distributed.broadcast_from_main(lambda: json.loads(self._noted(step).read_text()))
        # A run of an earlier version noted the number alone, of the metric that it compares.
        return noted if isinstance(noted, dict) else {self.metric: noted}

    def _check_metric(self) -> None:
        """Say so where the state that is kept was not measured by this metric: it is replaced by
        the next one.
        """
        if self.step is not None and self.value is None:
            self._warn(
                f"WARNING: the best state so far (step {self.step}) has no {self.metric}, so that "
                "the next evaluation counts as the best (checkpoint.best)."
            )

    def _noted(self, step: int) -> Any:
        return self._checkpoints.path / "values" / f"{step}.json"


def steps_saved(config: Config) -> list[int]:
    """Return the steps of a run's complete checkpoints, in order, without opening them."""
    return steps_in(checkpoint_directory(config))


def steps_in(path: Any) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, in order."""
    return (
        sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdigit())
        if path.is_dir()
        else []
    )


def _sizes(folder: Any) -> dict[str, int]:
    """Return the bytes of every file below a folder, by its path in it."""
    sizes, left = {}, [folder]
    while left:
        for entry in left.pop().iterdir():
            if entry.is_dir():
                left.append(entry)
            else:
                sizes[str(entry)[len(str(folder)) + 1 :]] = _size(entry)
    return sizes


def _size(entry: Any) -> int:
    """Return the bytes of a file; on disk without asking for its owner, who may have no name."""
    return entry.stat().length if "://" in str(entry) else os.stat(entry).st_size


def _without_key(state: TrainState) -> TrainState:
    return state._replace(key=None)


def _key_data(key: Any) -> Any:
    """Return the numbers of a key, or their shape."""
    if not isinstance(key, jax.ShapeDtypeStruct):
        return jax.random.key_data(key)
    shape = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=key.sharding)


def _flatten(state: TrainState) -> dict[str, Any]:
    """Return the leaves by name, in the tree's order, the key's numbers last."""
    leaves, _ = jax.tree.flatten_with_path(_without_key(state))
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    flat["key"] = _key_data(state.key)
    return {
        name: np.asarray(leaf) if isinstance(leaf, np.generic | int | float) else leaf
        for name, leaf in flat.items()
    }
