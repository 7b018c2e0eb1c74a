"""The processes of a run: how they find each other, agree, and end together.

Every process runs the same program; only process 0, the main process, prints and writes. A process
that fails tells the others, which then end too. One that dies without a word misses JAX's
heartbeat, which ends the others shortly after `HEARTBEAT` seconds.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import Interrupted, UserError, describe_os_error, listed, status
from jaxtune.core.heartbeats import Heartbeats, describe_death, describe_silence, find_dead
from jaxtune.core.text import visible

HEARTBEAT = 20
_FAILURE, _SHOWN = "jaxtune/failure", "jaxtune/shown"
# Milliseconds that a process may keep the others waiting, for example while it downloads a model.
_LONGEST = 24 * 3600 * 1000
_GRACE, _LOOK = 5.0, 1.0
# Every process asks in the same order, so the same number means the same question.
_numbers = count()


@dataclass(frozen=True)
class Cluster:
    """The launcher of the processes.

    Attributes:
        name: its name, for messages.
        arguments: the arguments of `jax.distributed.initialize`.

    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def find_cluster(environment: Mapping[str, str], has_tpu: bool = False) -> Cluster | None:
    """Return the launcher that the environment names; None for a single process.

    Args:
        environment: the environment of this process.
        has_tpu: whether this is a host of TPUs, where JAX asks the cloud.

    Raises:
        UserError: only a part of the settings is there.

    """
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        total = environment.get("JAX_NUM_PROCESSES")
        number = environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX"))
        if total is None or number is None:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID (or "
                "JOB_COMPLETION_INDEX) must be too."
            )
        return explicit_cluster(address, int(total), int(number)) if int(total) > 1 else None
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm(environment)
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return Cluster("Open MPI", {"cluster_detection_method": "ompi"})
    if has_tpu and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
        is_single = hosts is not None and "," not in hosts and slices == 1
        return None if is_single else Cluster("Cloud TPU")
    return None


def explicit_cluster(address: str, total: int, number: int) -> Cluster:
    """Return a cluster from the address of process 0, the number of processes and this one's.

    Raises:
        UserError: the address or a number is invalid.

    """
    if ":" not in address:
        raise UserError(f"--coordinator {address}: give host:port, such as {address}:8476.")
    if total < 1:
        raise UserError(f"--processes {total}: there is at least one.")
    if not 0 <= number < total:
        raise UserError(
            f"--process {number}: with {total} processes they are numbered 0 to {total - 1}."
        )
    arguments = {
        "coordinator_address": address,
        "num_processes": total,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }
    return Cluster("given", arguments)


def _slurm(environment: Mapping[str, str]) -> Cluster:
    """Return the cluster of a step of SLURM.

    A task has every GPU that it sees; where several tasks of a node see the same ones, its share.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    port = 61440 + (job * 31 + step) % 4096  # above the ports of outgoing connections
    number, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    total = int(environment["SLURM_STEP_NUM_TASKS"])
    arguments = explicit_cluster(f"{first_host(nodes)}:{port}", total, number).arguments
    tasks = re.split(r"[(,]", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0]
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if int(tasks) > 1 and len(gpus) > 1 and len(gpus) % int(tasks) == 0:
        share = len(gpus) // int(tasks)
        arguments |= {"local_device_ids": list(range(local * share, (local + 1) * share))}
    return Cluster("SLURM", arguments)


def first_host(nodes: str) -> str:
    """Return the first host in SLURM's compressed list: n[3-5,9],m1 begins with n3."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    assert match is not None
    return match[1] + (match[2] or "") + (match[3] or "")


def start(cluster: Cluster | None = None) -> None:
    """Join the other processes, if there are any, before the first computation. A second call does
    nothing.

    Args:
        cluster: the launcher; by default the one that the environment names.

    Raises:
        UserError: the processes do not find each other.

    """
    import jax

    if jax.distributed.is_initialized():
        return
    cluster = cluster or find_cluster(os.environ, _has_tpu())
    if cluster is None:
        return
    try:
        jax.distributed.initialize(**cluster.arguments, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The processes of this run ({cluster.name}) did not find each other: {reason}"
        ) from None
    if jax.process_count() > 1:
        ended = threading.Event()
        watcher = threading.Thread(
            target=_watch, args=(ended,), name="jaxtune-failures", daemon=True
        )
        watcher.start()
        atexit.register(lambda: (ended.set(), watcher.join()))  # before JAX leaves the others


def _has_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and (
        any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    )


def only_compiles_for_tpu() -> bool:
    """Return whether the compiler for TPUs is installed (for plans), and neither a TPU nor JAX for
    another accelerator.
    """
    others = any(
        importlib.util.find_spec(name)
        for name in ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")
    )
    return importlib.util.find_spec("libtpu") is not None and not _has_tpu() and not others


def is_multiprocess() -> bool:
    """Return whether there are other processes."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def require_single_process(command: str) -> None:
    """Refuse a command that one process alone can run.

    Raises:
        UserError: there are other processes.

    """
    if is_multiprocess():
        raise UserError(
            f"{command} runs in a single process, and there are several. Start it once, on one "
            "machine."
        )


def is_main() -> bool:
    """Return whether this is the main process, which prints and writes."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast_from_main(ask: Callable[[], Any]) -> Any:
    """Return on every process what `ask` returns on the main one, which alone calls it: a JSON
    value.
    """
    if not is_multiprocess():
        return ask()
    client, key = _client(), f"jaxtune/said/{next(_numbers)}"
    if is_main():
        answer = ask()
        client.key_value_set(key, json.dumps(answer))
        return answer
    return json.loads(client.blocking_key_value_get(key, _LONGEST))


def assert_same(what: str, values: Mapping[str, Any]) -> None:
    """Check that all processes have the same values, which JSON can hold, by name.

    Raises:
        UserError: this process has other ones than the main process; with their names.

    """
    main = broadcast_from_main(lambda: dict(values))
    differing = [
        f"{name} ({main.get(name)} there, {values.get(name)} here)"
        for name in sorted({*main, *values})
        if main.get(name) != values.get(name)
    ]
    if differing:
        raise UserError(
            f"Process {_index()} has another {what} than process 0: {listed(differing)}. All must "
            "have the same command and read the same files."
        )
    barrier("compared")  # none goes on before all have compared


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if is_multiprocess():
        _client().wait_at_barrier(f"jaxtune/{name}/{next(_numbers)}", _LONGEST)


def fetch(tree: Any) -> Any:
    """Return a tree's arrays as full numpy arrays on every process; all processes must call it."""
    import jax
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def main_only_path(target: Path) -> Iterator[Path]:
    """Give the path to write what only the main process keeps: `target` there, a temporary path on
    the other processes.

    All processes thus run the same code, which may compute together what it writes.
    """
    if is_main():
        yield target
        return
    scratch = Path(tempfile.mkdtemp(prefix="jaxtune-"))
    try:
        yield scratch / target.name
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """End all processes where one fails inside: the main process prints the first error, and each
    exits with its status.

    Without other processes the error is raised as usual.
    """
    try:
        yield
    except BaseException as error:
        if not is_multiprocess() or isinstance(error, SystemExit | Interrupted):
            raise
        _report(error)


def fail_all(error: Exception) -> None:
    """End this process and all others with an error, from any thread."""
    if is_multiprocess():
        _report(error)
    say_error(str(error))
    _leave(status(error))


def say_error(text: str) -> None:
    """Print to stderr; a reader that is gone must not keep a process from ending."""
    with contextlib.suppress(OSError, ValueError):
        print(f"jaxtune: {visible(text)}", file=sys.stderr, flush=True)


def _report(error: BaseException) -> None:
    """Tell the other processes, and let the main one print; raise here where it does not answer."""
    import jax

    if os.environ.get("JAXTUNE_DEBUG") == "1":
        traceback.print_exception(error)
    client, is_printing = _client(), is_main()
    number, text = jax.process_index(), _text(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and (
        dead := find_dead(client, number, told=None if is_printing else _FAILURE)
    ):
        number, text = 0, describe_death(dead)
    message = {"process": number, "text": text, "status": status(error)}
    try:
        client.key_value_set(_FAILURE, json.dumps(message))
    except jax.errors.JaxRuntimeError:  # another process was first
        time.sleep(_GRACE)
    if is_printing:
        _show_and_leave(client)
    try:
        client.blocking_key_value_get(_SHOWN, int(_GRACE * 1000))
    except jax.errors.JaxRuntimeError:
        raise error from None
    _leave(status(error))


def _text(error: BaseException) -> str:
    described = describe_os_error(error) if isinstance(error, OSError) else None
    return described or str(error) or type(error).__name__


def _watch(ended: threading.Event) -> None:
    """Look for a failure of any process, and end with it."""
    import jax

    client = _client()
    heartbeats = Heartbeats(client, jax.process_index())
    while not ended.wait(_LOOK):
        heartbeats.beat()
        if is_main():
            heartbeats.listen()
            if silent := heartbeats.newly_silent():
                say_error(describe_silence(silent))
        try:
            message = json.loads(client.key_value_try_get(_FAILURE))
        except jax.errors.JaxRuntimeError:  # no process has failed
            continue
        if is_main():
            _show_and_leave(client)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.blocking_key_value_get(_SHOWN, int(_GRACE * 1000))
        _leave(message["status"])
    heartbeats.end()


def _show_and_leave(client: Any) -> None:
    failed = json.loads(client.blocking_key_value_get(_FAILURE, 1000))
    where = f"process {failed['process']}: " if failed["process"] else ""
    say_error(f"{where}{failed['text']}")
    client.key_value_set(_SHOWN, "", allow_overwrite=True)
    time.sleep(_GRACE / 2)  # the others still read from this process
    _leave(failed["status"])


def _leave(status: int) -> None:
    """End at once; a normal exit would wait for the other processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _index() -> int:
    import jax

    return jax.process_index()


def _client() -> Any:
    """Return the processes' key-value store. JAX has no public name for it; orbax uses this one."""
    from jax._src import distributed

    return distributed.global_state.client
