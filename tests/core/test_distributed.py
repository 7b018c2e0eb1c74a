"""How processes find each other: the environments of launchers, as they set them."""

import pytest

from jaxtune.cli.main import main
from jaxtune.core.distributed import (
    broadcast_from_main,
    find_cluster,
    first_host,
    is_main,
    is_multiprocess,
)
from jaxtune.core.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[3-5,9],m1", "n3"),
        ("gpu-a[007-012]", "gpu-a007"),
        ("r1n[2,4]", "r1n2"),
        ("a[1-2].example", "a1.example"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_host(nodes) == first


def test_a_step_of_slurm():
    cluster = find_cluster(SLURM)
    assert cluster.name == "SLURM"
    where = {"num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate"}
    assert cluster.arguments == where | {"coordinator_address": f"gpu07:{61440 + 77 * 31 % 4096}"}
    assert (
        find_cluster(SLURM | {"SLURM_STEP_ID": "1"}).arguments["coordinator_address"]
        != cluster.arguments["coordinator_address"]
    )


def test_slurm_without_a_step_of_several_tasks_is_one_process():
    """A shell within an allocation, or a batch script, that starts the program itself."""
    assert find_cluster({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert find_cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("visible", "tasks", "ids"),
    [
        ("0,1,2,3", "2(x2)", [2, 3]),
        ("0,1", "2(x2)", [1]),
        ("5", "2(x2)", None),
        ("0,1,2,3", "1(x4)", None),
        ("", "2(x2)", None),
    ],
)
def test_which_gpus_of_its_node_a_task_has(visible, tasks, ids):
    """All it sees where it is alone or SLURM has bound one to it; its share where several see
    the same.
    """
    environment = SLURM | {"CUDA_VISIBLE_DEVICES": visible, "SLURM_STEP_TASKS_PER_NODE": tasks}
    assert find_cluster(environment).arguments.get("local_device_ids") == ids


def test_other_launchers():
    assert find_cluster({"OMPI_COMM_WORLD_SIZE": "2"}).arguments == {
        "cluster_detection_method": "ompi"
    }
    assert find_cluster({"OMPI_COMM_WORLD_SIZE": "1"}) is None
    named = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"}
    for number in ({"JAX_PROCESS_ID": "1"}, {"JOB_COMPLETION_INDEX": "1"}):
        cluster = find_cluster(named | number)
        assert cluster.arguments["process_id"] == 1
        assert cluster.arguments["coordinator_address"] == "host:1"
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        find_cluster(named)
    assert find_cluster(named | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    assert find_cluster({}) is None


def test_hosts_of_tpus():
    """JAX asks the cloud; a host that GKE says is alone is one process."""
    assert find_cluster({}, has_tpu=True).name == "Cloud TPU"
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "a,b"}, has_tpu=True).arguments == {}
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "localhost"}, has_tpu=True) is None
    assert (
        find_cluster({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, has_tpu=True)
        is not None
    )
    assert find_cluster({"JAX_PLATFORMS": "cpu"}, has_tpu=True) is None
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "a,b"}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "go together"),
        (
            ["--coordinator", "host", "--processes", "2", "--process", "0"],
            "give host:port, such as host:8476",
        ),
        (["--coordinator", "host:1", "--processes", "2", "--process", "2"], "numbered 0 to 1"),
    ],
)
def test_flags_that_cannot_be(options, message, capsys):
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_single_process_is_the_main_one():
    assert is_main()
    assert not is_multiprocess()
    assert broadcast_from_main(lambda: {"a": 1}) == {"a": 1}
