"""The process-wide settings of JAX that all commands share."""

import logging
import os

from jaxtune.core import distributed
from jaxtune.core.distributed import Cluster
from jaxtune.core.files import default_cache_root


def start(cluster: Cluster | None = None) -> None:
    """Join the other processes of the run, if any, and cache compiled programs between commands.

    Call it before the first computation. Programs are cached in `JAX_COMPILATION_CACHE_DIR`, or
    `~/.cache/jaxtune/xla`.
    """
    # transformers would advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    use_own_precisions()
    # orbax warns of what this program reports itself.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if os.environ.get("JAX_PLATFORMS") is None and distributed.only_compiles_for_tpu():
        jax.config.update("jax_platforms", "cpu")
    if jax.config.values["jax_compilation_cache_dir"] is None:
        # Not cache_root(): compiled programs have a variable of their own, JAX's.
        jax.config.update("jax_compilation_cache_dir", str(default_cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    distributed.start(cluster)


def use_own_precisions() -> None:
    """Ignore JAX_DEFAULT_MATMUL_PRECISION: every product here says its own precision, and the
    variable would also reach kernels that have only one, such as splash attention.
    """
    import jax

    jax.config.update("jax_default_matmul_precision", None)
