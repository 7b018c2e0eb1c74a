"""Several processes of one run: how they find each other, speak as one, and end together.

Every process runs the same program; what is printed and written is the first one's, the lead's. A
process that fails tells the others, which then end too; one that dies untold is missed by JAX's
heartbeat, which ends them within `HEARTBEAT` seconds and a few more.
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

from jaxtune.core.errors import Interrupted, UserError, status

HEARTBEAT = 20
_FAILURE, _SHOWN = "jaxtune/failure", "jaxtune/shown"
_LONGEST = (
    24 * 3600 * 1000
)  # milliseconds that one process may let the others wait, say while it downloads a model
_GRACE, _LOOK = 5.0, 1.0
_numbers = (
    count()
)  # every process asks in the same order, so the same number means the same question


@dataclass(frozen=True)
class Cluster:
    """What started the processes.

    Attributes:
        name: for a message.
        arguments: of `jax.distributed.initialize`.

    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def find_cluster(environment: Mapping[str, str], has_tpu: bool = False) -> Cluster | None:
    """What started this process beside others, by its environment; None where it is alone.

    Args:
        environment: the process's.
        has_tpu: whether this is a host of TPUs, where JAX asks the cloud.

    Raises:
        UserError: settings that are there in part.

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
        alone = hosts is not None and "," not in hosts and slices == 1
        return None if alone else Cluster("Cloud TPU")
    return None


def explicit_cluster(address: str, total: int, number: int) -> Cluster:
    """Processes that were told where the first is, how many they are and which this is.

    Raises:
        UserError: numbers that cannot be.

    """
    if ":" not in address:
        raise UserError(f"--coordinator {address}: give host:port, such as {address}:8476.")
    if not 0 <= number < total:
        raise UserError(
            f"--process {number}: with {total} processes they are numbered 0 to {total - 1}."
        )
    where = {"coordinator_address": address, "num_processes": total, "process_id": number}
    return Cluster("given", where | {"cluster_detection_method": "deactivate"})


def _slurm(environment: Mapping[str, str]) -> Cluster:
    """A step of SLURM. A task has all GPUs of its node that it sees, or where several tasks see
    the same its share of them.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    port = 61440 + (job * 31 + step) % 4096  # beyond what systems give to outgoing connections
    number, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    found = explicit_cluster(
        f"{first_host(nodes)}:{port}", int(environment["SLURM_STEP_NUM_TASKS"]), number
    )
    tasks = re.split(r"[(,]", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0]
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if int(tasks) > 1 and len(gpus) > 1 and len(gpus) % int(tasks) == 0:
        share = len(gpus) // int(tasks)
        return Cluster(
            "SLURM",
            found.arguments | {"local_device_ids": list(range(local * share, (local + 1) * share))},
        )
    return Cluster("SLURM", found.arguments)


def first_host(nodes: str) -> str:
    """The first name in SLURM's short form of a list: n[3-5,9],m1 begins with n3."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    assert found is not None
    return found[1] + (found[2] or "") + (found[3] or "")


def start(cluster: Cluster | None = None) -> None:
    """Join the other processes, where there are any; call before the first computation. A second
    call does nothing.

    Args:
        cluster: where they are; found by itself by default.

    Raises:
        UserError: the others do not come.

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
        over = threading.Event()
        watcher = threading.Thread(
            target=_watch, args=(over,), name="jaxtune-failures", daemon=True
        )
        watcher.start()
        atexit.register(lambda: (over.set(), watcher.join()))  # before JAX leaves the others


def _has_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and (
        any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    )


def only_compiles_for_tpu() -> bool:
    """Whether the compiler for TPUs is installed (for plans), and neither a TPU nor JAX for
    another accelerator is there.
    """
    others = any(
        importlib.util.find_spec(name)
        for name in ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")
    )
    return importlib.util.find_spec("libtpu") is not None and not _has_tpu() and not others


def is_multiprocess() -> bool:
    """Whether there are other processes."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def require_single_process(command: str) -> None:
    """Refuse to go on as one of several.

    Raises:
        UserError: there are other processes.

    """
    if is_multiprocess():
        raise UserError(
            f"{command} runs in one process, and there are several. Start it once, on one machine."
        )


def is_main() -> bool:
    """Whether this process prints and writes."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast_from_main(ask: Callable[[], Any]) -> Any:
    """What the lead's `ask` returns, which JSON must hold; only the lead calls it."""
    if not is_multiprocess():
        return ask()
    client, key = _client(), f"jaxtune/said/{next(_numbers)}"
    if is_main():
        said = ask()
        client.key_value_set(key, json.dumps(said))
        return said
    return json.loads(client.blocking_key_value_get(key, _LONGEST))


def assert_same(what: str, value: str) -> None:
    """That all processes have the same `value`.

    Raises:
        UserError: this one has another than the lead.

    """
    if broadcast_from_main(lambda: value) != value:
        raise UserError(
            f"Process {_index()} has another {what} than process 0. All must read the same files."
        )


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if is_multiprocess():
        _client().wait_at_barrier(f"jaxtune/{name}/{next(_numbers)}", _LONGEST)


def fetch(tree: Any) -> Any:
    """The arrays of a tree as numpy arrays, whole, on every process; all must ask."""
    import jax
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def main_only_path(target: Path) -> Iterator[Path]:
    """Where this process writes what only the lead keeps: `target`, for the others a place of their
    own that is removed.

    So all run the same code, and what they must compute together to write it they do.
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
    """What fails in here ends all processes: the lead prints the first error, and each exits with
    its status.

    A process that is alone is left to its own.
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
    print(f"jaxtune: {error}", file=sys.stderr, flush=True)
    _leave(status(error))


def _report(error: BaseException) -> None:
    """Tell the others, and leave it to the lead to print; without it, raise here."""
    import jax

    if os.environ.get("JAXTUNE_DEBUG") == "1":
        traceback.print_exception(error)
    client, lead = _client(), is_main()
    message = json.dumps(
        {
            "process": jax.process_index(),
            "text": str(error) or type(error).__name__,
            "status": status(error),
        }
    )
    try:
        client.key_value_set(_FAILURE, message)
    except jax.errors.JaxRuntimeError:  # another was first
        time.sleep(_GRACE)
    if lead:
        _show_and_leave(client)
    try:
        client.blocking_key_value_get(_SHOWN, int(_GRACE * 1000))
    except jax.errors.JaxRuntimeError:
        raise error from None
    _leave(status(error))


def _watch(over: threading.Event) -> None:
    """Look for a failure of any process, and end with it."""
    import jax

    client = _client()
    while not over.wait(_LOOK):
        try:
            message = json.loads(client.key_value_try_get(_FAILURE))
        except jax.errors.JaxRuntimeError:  # there is none
            continue
        if is_main():
            _show_and_leave(client)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.blocking_key_value_get(_SHOWN, int(_GRACE * 1000))
        _leave(message["status"])


def _show_and_leave(client: Any) -> None:
    failed = json.loads(client.blocking_key_value_get(_FAILURE, 1000))
    where = f"process {failed['process']}: " if failed["process"] else ""
    print(f"jaxtune: {where}{failed['text']}", file=sys.stderr, flush=True)
    client.key_value_set(_SHOWN, "", allow_overwrite=True)
    time.sleep(_GRACE / 2)  # the others ask this process
    _leave(failed["status"])


def _leave(status: int) -> None:
    """End at once: the others are not waited for, as a normal end would."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _index() -> int:
    import jax

    return jax.process_index()


def _client() -> Any:
    """The processes' common notice board. JAX has no public name for it; orbax takes it from
    here too.
    """
    from jax._src import distributed

    return distributed.global_state.client
