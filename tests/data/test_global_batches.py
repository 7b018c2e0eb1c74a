"""Whatever the mesh and the process count, the global batches are the same."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxtune.core.mesh import make_mesh
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.examples import in_memory
from jaxtune.data.loader import BatchSchedule, batches, local_rows
from jaxtune.data.packing import Layout
from tests.support import tools


def example_of(size, number):
    return Example(np.arange(number, number + size + 1, dtype=np.int32), np.arange(size + 1) > 0)


@pytest.mark.parametrize("axes", [(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_the_batches_are_the_same_on_every_mesh(axes):
    items = in_memory(
        [
            example_of(size, number)
            for number, size in enumerate(np.random.default_rng(1).integers(1, 30, 90))
        ]
    )
    schedule = BatchSchedule(items, Layout(16, 32, True, True, 0), epochs=1)
    for loaded in batches(schedule, 0, 2, make_mesh(*axes)):
        whole = schedule.batch(loaded.index)
        for ours, theirs in zip(*map(jax.tree.leaves, (loaded.batch, whole)), strict=True):
            np.testing.assert_array_equal(np.asarray(ours).reshape(theirs.shape), theirs)


PROCESS = """
import sys
import jax
count, number, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 4 // count)
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, number)
import numpy as np
from jaxtune.core.mesh import make_mesh
from jaxtune.data.examples import in_memory
from jaxtune.data.loader import BatchSchedule, batches, local_rows
from jaxtune.data.packing import Layout
from jaxtune.data.chat.tokenize import Example
def example_of(size, number):
    return Example(np.arange(number, number + size + 1, dtype=np.int32), np.arange(size + 1) > 0)
sizes = np.random.default_rng(1).integers(1, 30, 60)
items = in_memory([example_of(size, number) for number, size in enumerate(sizes)])
schedule = BatchSchedule(items, Layout(8, 32, True, True, 0), epochs=2)
mesh = make_mesh(1, 4, 1)
assert local_rows(8, 2, mesh).sum() == 8 // count
loaded_rows = {}
for loaded in batches(schedule, 0, 2, mesh):
    for name, part in loaded.batch._asdict().items():
        if part is None:  # labels, where nothing is compared
            continue
        for shard in part.addressable_shards:
            cut, rows, _ = shard.index
            for row in range(*rows.indices(4)):
                key = f"{loaded.index} {name} {row} {loaded.tokens} {loaded.padding}"
                loaded_rows[key] = np.asarray(shard.data)[:, row - (rows.start or 0)]
np.savez(out, **loaded_rows)
"""


def test_one_two_and_four_processes_load_the_same_global_batches(tmp_path):
    """Each process builds the rows of its own devices; together they are the batches of this one
    process.
    """
    items = in_memory(
        [
            example_of(size, number)
            for number, size in enumerate(np.random.default_rng(1).integers(1, 30, 60))
        ]
    )
    schedule = BatchSchedule(items, Layout(8, 32, True, True, 0), epochs=2)
    for count in (2, 4):
        port = 20_000 + os.getpid() % 20_000 + count
        children = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    PROCESS,
                    str(count),
                    str(number),
                    str(port),
                    str(tmp_path / f"{count}-{number}.npz"),
                ],
                env=tools.child_environment() | {"PYTHONPATH": "."},
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        for process in children:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-2000:]
        loaded_rows: dict[str, np.ndarray] = {}
        for number in range(count):
            with np.load(tmp_path / f"{count}-{number}.npz") as file:
                assert not loaded_rows.keys() & file.keys()
                loaded_rows |= {key: file[key] for key in file}
        assert len(loaded_rows) == len(schedule) * 5 * 4
        for index in range(len(schedule)):
            batch, tokens = schedule.batch(index), schedule.tokens(index)
            for name, part in batch._asdict().items():
                if part is None:
                    continue
                for row, values in enumerate(np.swapaxes(part.reshape(2, 4, -1), 0, 1)):
                    np.testing.assert_array_equal(
                        loaded_rows[f"{index} {name} {row} {tokens} {part.size - tokens}"], values
                    )


def test_local_rows_are_all_rows_of_one_process(one_device):
    assert local_rows(8, 2, one_device).all()
