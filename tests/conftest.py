"""Eight fake CPU devices, strict dtype promotion, compiled programs kept between runs.

On a GPU (JAX_PLATFORMS=cuda,cpu, as `scripts/device/check` sets it) there is one device; what the
tests compare is float32 there too.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # the compiler for TPUs is installed, and none is there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAXTUNE_CACHE", tempfile.mkdtemp(prefix="jaxtune-tests-"))
# Several processes share a GPU; by itself each would take most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Child processes of the tests share the folder of compiled programs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxtune-tests-xla")
)

# By itself XLA ends the process where one of eight devices comes 40 s late to a collective: on busy
# cores that is no deadlock.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600")

import jax

jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", "8")))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

import pytest  # noqa: E402 (the settings above must stand before anything starts a backend)

from jaxtune.core.dtypes import AUTO  # noqa: E402 (likewise)
from jaxtune.core.mesh import make_mesh  # noqa: E402 (likewise)
from tests.support import tools  # noqa: E402 (likewise: torch and Transformers read them)

ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
AUTO.update(gpu="float32", tpu="float32")

# The files that take longest begin first: no process ends long after the other.
LONG = [
    "config/test_effects.py", "evaluation/test_evaluate.py", "planning/test_planner.py",
    "parity/test_families.py", "workflows/test_sweep.py", "training/test_meshes.py",
    "weights/test_peft.py", "parity/test_methods.py", "workflows/test_train_by_method.py",
    "training/test_methods.py", "workflows/test_early_stopping.py", "inference/test_engine.py",
    "evaluation/test_harness.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sort the tests by file, long files first."""

    def place(item):
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONG.index(path) if path in LONG else len(LONG)

    items.sort(key=place)


def pytest_runtest_setup(item):
    """Leave out what needs more devices than there are."""
    marker = item.get_closest_marker("devices")
    if marker is not None and jax.device_count() < marker.args[0]:
        pytest.skip(f"needs {marker.args[0]} devices; there are {jax.device_count()}")


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile quickly, for modules whose every test compiles programs of its own: what they
    compute counts there, not how fast. A GPU's compiler has no such way.
    """
    jax.config.update("jax_disable_most_optimizations", ON_CPU)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drop compiled programs before the process has as many mappings as the kernel allows
    (65,530): beyond that it crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device, for what does not concern sharding."""
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Directory of a tiny random Llama with a byte-level tokenizer and a ChatML template."""
    return tools.save_model(
        tmp_path_factory.mktemp("chat_model"), tools.tiny_config(), tools.byte_tokenizer()
    )


@pytest.fixture(scope="session")
def smollm2():
    """The packaged real model's file."""
    from jaxtune.weights.bundled import smollm2

    return smollm2()
