"""The same run on every mesh and process count: equal losses, equal adapters, and checkpoints
that each restores of the other.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import date

import jax
import numpy as np
import pytest

from jaxtune.config.load import load_config
from jaxtune.core.distributed import HEARTBEAT
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import AXES, make_mesh
from jaxtune.tracking.metrics_log import MetricsLog, read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import checkpoint_directory
from jaxtune.training.batch_source import ScheduledBatches
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.loop import fit
from jaxtune.training.setup import build_setup
from tests.support import tools
from tests.support.cases import OnDemand, thinned

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 6
MESHES = {
    "one": {"fsdp": 1},
    "8x1x1": {"data": 8, "fsdp": 1},
    "1x8x1": {"fsdp": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "1x2x4": {"fsdp": 2, "tensor": 4},
    "context 2": {"fsdp": 2, "context": 2, "tensor": 2},
    "context 4": {"fsdp": 2, "context": 4},
    "two slices of 4": {"slices": 2, "fsdp": 2, "tensor": 2},
    "two slices, context 4": {"slices": 2, "fsdp": 1, "context": 4},
}

KEPT = ["1x8x1", "1x2x4", "context 2", "two slices of 4"]  # each axis is divided in one of them


def keys(model, rows, directory, mesh, **further):
    values = {
        "model.source": model, "data.train": rows, "run.dir": directory, "data.max_length": 64,
        "optimizer.learning_rate": 5e-3,
        "train.batch_size": 8, "train.steps": STEPS, "adapter.rank": 4, "adapter.dropout": 0.2,
        "checkpoint.every": 3, "optimizer.warmup": 0,
    }  # fmt: skip
    values |= (
        {f"mesh.{axis}": 1 for axis in AXES}
        | {f"mesh.{axis}": size for axis, size in mesh.items()}
        | further
    )
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers, four key/value heads, rows of 8 heads' worth: everything divides over four,
    the vocabulary over none.
    """
    config = tools.tiny_config(
        vocab_size=289,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        hidden_size=64,
    )
    return tools.save_model(tmp_path_factory.mktemp("model"), config, tools.byte_tokenizer())


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tools.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tools.sums(64))


class Trained:
    """A run of the loop alone on one mesh."""

    def __init__(self, name, model, rows, directory):
        self.config = load_config(overrides=keys(model, rows, directory, MESHES[name]))
        self.parts = (
            build_setup(self.config, Reporter(quiet=True), date(2026, 1, 1))
            if name != "one"
            else self._alone()
        )
        directory.mkdir()
        checkpoints, log = Checkpoints(checkpoint_directory(self.config)), MetricsLog(directory, 0)
        with jax.set_mesh(self.parts.mesh), Reporter(quiet=True).task("Training", STEPS) as task:
            source = ScheduledBatches(
                self.parts.schedule, self.parts.micro_batches, self.parts.mesh
            )
            self.state = fit(
                self.parts,
                self.parts.initial(),
                source,
                log=log,
                checkpoints=checkpoints,
                task=task,
            ).state
        checkpoints.close()
        log.close()
        self.losses = [row["loss"] for row in read_metrics(directory)]
        self.leaves = leaves(self.state)

    def _alone(self):
        from jaxtune.training import setup as module

        whole = module.make_mesh
        module.make_mesh = lambda *sizes: make_mesh(devices=jax.devices()[:1])
        try:
            return build_setup(self.config, Reporter(quiet=True), date(2026, 1, 1))
        finally:
            module.make_mesh = whole

    def restored(self, config):
        checkpoints = Checkpoints(checkpoint_directory(config))
        try:
            return leaves(checkpoints.restore(self.parts.state_layout))
        finally:
            checkpoints.close()


def leaves(state):
    return [
        np.asarray(leaf)
        for leaf in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    ]


@pytest.fixture(scope="module")
def runs(model, rows, tmp_path_factory):
    """Each is trained when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")
    return OnDemand(lambda name: Trained(name, model, rows, root / name))


@pytest.mark.parametrize("name", thinned([name for name in MESHES if name != "one"], *KEPT))
def test_losses_and_adapters_do_not_depend_on_the_mesh(runs, name):
    single, other = runs["one"], runs[name]
    assert dict(other.parts.mesh.shape) == {axis: MESHES[name].get(axis, 1) for axis in AXES}
    np.testing.assert_allclose(other.losses, single.losses, rtol=1e-5)
    assert single.losses[-1] < 0.9 * single.losses[0]
    moved = 0.0
    for here, there in zip(other.leaves, single.leaves, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-4)
        moved = max(moved, float(np.abs(there).max()))
    assert moved > 1e-2


@pytest.mark.parametrize("name", thinned(MESHES, *KEPT))
def test_each_mesh_restores_the_checkpoints_of_all_others(runs, name):
    """The slow ones restore all there are, the others those of one another."""
    for other in [runs[other] for other in (KEPT if name in KEPT else MESHES)]:
        for here, there in zip(runs[name].restored(other.config), other.leaves, strict=True):
            np.testing.assert_array_equal(here, there)


def test_parameters_and_moments_are_spread_over_the_mesh(runs):
    """Over fsdp 8 a device holds an eighth of every matrix, of its adapter's A and of the
    moments of that.
    """
    parts, state = runs["1x8x1"].parts, runs["1x8x1"].state
    whole = {
        leaf.shape: leaf.addressable_shards[0].data.size
        for leaf in jax.tree.leaves(parts.frozen)
        if leaf.ndim == 3
    }
    assert whole
    assert all(size * 8 == np.prod(shape) for shape, size in whole.items())
    for tree in (state.trainable, state.opt_state):
        paths = (
            (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
        )
        spread = [leaf for path, leaf in paths if "up_proj" in path and "lora_A" in path]
        assert len(spread) == (1 if tree is state.trainable else 2)
        assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in spread)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 3}, r"needs 3 devices and there are 8. The nearest that fits: mesh: {fsdp: 8}"),
        ({"fsdp": 2, "tensor": 3}, r"The nearest that fits: mesh: {fsdp: 4, tensor: 2}"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
        ({"fsdp": 0}, "mesh.fsdp = 0"),
        ({"slices": 2, "tensor": 3, "fsdp": 1}, r"mesh: {slices: 2, fsdp: 2, tensor: 2}"),
    ],
)
def test_meshes_that_cannot_be_are_refused_with_the_nearest(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**({"fsdp": 1} | mesh))


@pytest.mark.parametrize(
    ("mesh", "further", "message"),
    [
        (
            {"fsdp": 8},
            {"train.batch_size": 12},
            "train.batch_size = 12 does not divide over 8 devices .* Use 16, or 8",
        ),
        (
            {"fsdp": 8},
            {"train.micro_batch_size": 4},
            "train.micro_batch_size = 4 does not divide over 8 .* Use 8",
        ),
        (
            {"fsdp": 1, "context": 8},
            {"data.max_length": 60},
            "data.max_length = 60 .*mesh.context.* Use 64, or 56",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest(
    model, rows, tmp_path, mesh, further, message
):
    config = load_config(overrides=keys(model, rows, tmp_path / "run", mesh, **further))
    with pytest.raises(UserError, match=message):
        build_setup(config, Reporter(quiet=True))


def launch(count, devices, arguments, directory):
    """`count` processes of the command line, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    begun = []
    for number in range(count):
        where = [
            "--coordinator",
            f"localhost:{port}",
            "--processes",
            str(count),
            "--process",
            str(number),
        ]
        environment = tools.child_environment() | {"JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, "-m", "jaxtune", "train", *arguments, *where]
        with (directory / f"{number}.err").open("w") as error:
            begun.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error)
            )
    return begun


@pytest.mark.slow
def test_processes_compute_the_same_one_that_dies_ends_all_and_others_go_on(
    model, rows, runs, tmp_path
):
    """Four processes of two devices; one is killed; two of four go on from the checkpoint, and
    it is as if one had done it all.
    """
    arguments = keys(
        model, rows, tmp_path / "run", {"fsdp": 4, "tensor": 2}, **{"run.watchdog": 300}
    )
    begun = launch(4, 2, arguments, tmp_path)
    while (
        all(process.poll() is None for process in begun) and len(read_metrics(tmp_path / "run")) < 4
    ):
        time.sleep(0.1)
    begun[2].send_signal(signal.SIGKILL)
    died = time.monotonic()
    codes = [process.wait(timeout=120) for process in begun]
    assert time.monotonic() - died < 30
    assert time.monotonic() - died < HEARTBEAT + 10
    assert codes[2] == -signal.SIGKILL
    assert all(code for code in codes), (tmp_path / "0.err").read_text()
    said = (tmp_path / "0.err").read_text()
    assert "jaxtune: process 2 " in said, said  # is gone, or has not been heard of
    assert "Start the same command again" in said
    assert not any((tmp_path / "run").glob("adapter*"))
    codes = [process.wait(timeout=400) for process in launch(2, 4, arguments, tmp_path)]
    assert codes == [0, 0], (tmp_path / "0.err").read_text() + (tmp_path / "1.err").read_text()
    assert "Going on after step 3" in (tmp_path / "0.err").read_text()
    assert not (tmp_path / "1.err").read_text()  # the main process alone speaks
    trained = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in trained], runs["one"].losses, rtol=1e-5)
    config = load_config(overrides=arguments)
    for here, there in zip(runs["1x2x4"].restored(config), runs["one"].leaves, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-4)
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["devices"] == {"kind": "cpu", "count": 8, "processes": 2}


def test_what_is_wrong_on_one_process_is_said_once_and_ends_all(model, rows, tmp_path):
    shutil.copy(rows, tmp_path / "rows.jsonl")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(tools.chat("1?", "1")) + "\n")
    mesh = {"fsdp": 2}
    both = [keys(model, path, tmp_path / "run", mesh) for path in (rows, tmp_path / "rows.jsonl")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    begun = []
    for number, arguments in enumerate(both):
        environment = tools.child_environment() | {
            "JAX_NUM_CPU_DEVICES": "1", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number),
        }  # fmt: skip
        command = [sys.executable, "-m", "jaxtune", "train", *arguments]
        begun.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[1] for process in begun]
    assert [process.returncode for process in begun] == [2, 2], said
    assert (
        said[0]
        .splitlines()[-1]
        .startswith("jaxtune: process 1: Process 1 has another configuration than process 0")
    )
    assert not said[1].strip(), said[1]
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert os.path.exists(rows)
