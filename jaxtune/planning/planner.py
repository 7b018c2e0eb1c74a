"""The plan of a run: its step compiled for a target, in a process of its own, and what came of
it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxtune.config.schema import Config
from jaxtune.core.errors import RunError, UserError
from jaxtune.core.files import cache_root, locked, read_json, write_json
from jaxtune.planning.target import Target, parse

_TIMEOUT = 1800
_SCHEMA = 2
_FULL = re.compile(r"([\d.]+)([KMGT])\)? exceeds available HBM \(?([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """What a step takes. Bytes are of one device.

    Attributes:
        target: where it was planned for.
        mesh: sizes of the mesh's axes.
        devices: in all.
        fits: whether `peak_bytes` is within `capacity_bytes`.
        capacity_bytes: what a program may use; None for this machine.
        peak_bytes: arguments + outputs - aliases + temporaries: the safe reading. None where the
            compiler gave up, and `needed_bytes` is what it wanted.
        compiler_peak_bytes: the compiler's own figure, which counts what is not there at the same
            time once.
        argument_bytes, output_bytes, alias_bytes, temp_bytes: its parts.
        weight_bytes, state_bytes: of the arguments the frozen weights, and what trains with the
            optimizer's moments.
        remat: the remat policy, as given or as taken for train.remat=auto.
        tokens_per_step: positions of a global batch.
        flops_per_step, flops_per_token: of the matrix products, layers and recomputation counted,
            over all devices.
        collectives: bytes sent by one device and their number, by mesh axes and kind.
        largest_collectives: the few largest.
        largest_buffers: names and bytes of the largest temporaries.
        seconds: `compute`, `memory`, `communication`, `least`, `most` of the roofline; empty for
            this machine.
        tokens_per_second: at `least` and at `most`, over all devices.
        mfu_bound: at `least`: 4 FLOP a frozen parameter and token, 6 a trained one, over the chips'
            peak.
        compile_seconds: that it took.
        advice: what to change where it does not fit.

    """

    target: str
    mesh: dict[str, int]
    devices: int
    fits: bool
    capacity_bytes: int | None
    peak_bytes: int | None
    needed_bytes: int | None = None
    compiler_peak_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    temp_bytes: int | None = None
    weight_bytes: int = 0
    state_bytes: int = 0
    trainable_parameters: int = 0
    frozen_parameters: int = 0
    tokens_per_step: int = 0
    remat: str = ""
    flops_per_step: int = 0
    flops_per_token: float = 0.0
    collectives: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    largest_collectives: list[dict[str, Any]] = field(default_factory=list)
    largest_buffers: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: list[float] = field(default_factory=list)
    mfu_bound: float | None = None
    compile_seconds: float = 0.0
    advice: list[str] = field(default_factory=list)


def plan(config: Config, on: str) -> Plan:
    """Compile the step of a run for a target and say what it takes; what was planned before is read
    from the cache.

    Args:
        config: the resolved configuration; of the model only its `config.json` is read, of the data
            nothing.
        on: `here`, a TPU such as `v5e:4x4`, `v5p:4x4x4` or `2*v6e:8x8`, or GPUs such as `h100:16`.

    Raises:
        UserError: no such target or model, a configuration that does not fit the mesh, or the
            target's compiler is not installed.
        RunError: the compiler failed otherwise.

    """
    found = plans([config], on)[0]
    if isinstance(found, Exception):
        raise found
    return found


def plans(
    configs: Sequence[Config], on: str, parallel: int | None = None
) -> list[Plan | Exception]:
    """The plans of several configurations, compiled beside each other; an error in the place of a
    plan that cannot be made.

    Args:
        configs: the configurations.
        on: the target.
        parallel: processes at a time; one a core by default.

    """
    target = parse(on)
    with ThreadPoolExecutor(parallel or default_parallel()) as pool:
        return list(pool.map(lambda config: _planned(config, target), configs))


def default_parallel() -> int:
    """How many compilers run beside each other: one a core, each of which may take a few GB."""
    return max(1, min(os.cpu_count() or 1, 8))


def _planned(config: Config, target: Target) -> Plan | Exception:
    try:
        if target.kind is None:
            return _read(_here(config))
        place = _cache_file(config, target)
        with locked(place.with_suffix(".lock")):
            if not place.exists():
                write_json(place, _in_child(config, target))
        return _read(read_json(place))
    except (UserError, RunError) as error:
        return error


def _read(found: dict[str, Any]) -> Plan:
    return Plan(**found)


def _here(config: Config) -> dict[str, Any]:
    from jaxtune.planning.worker import measured

    return measured(config, parse("here"))


def _in_child(config: Config, target: Target) -> dict[str, Any]:
    """What `measured` says, in a process that has the target's environment."""
    request = {"config": config.model_dump(mode="json", exclude_unset=True), "on": target.name}
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("XLA_FLAGS")
    } | target.environment()
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        write_json(asked, request)
        command = [sys.executable, "-m", "jaxtune.planning.worker", str(asked), str(answer)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise RunError(
                f"{target.name}: the compiler was not done after {_TIMEOUT // 60} minutes."
            ) from None
        if not answer.exists():
            last = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise RunError(
                f"{target.name}: the process that compiles ended with {done.returncode}:\n{last}"
            )
        found = read_json(answer)
    if "error" in found:
        raise (UserError if found["yours"] else RunError)(found["error"])
    return found


def memory_wanted(message: str) -> tuple[int, int] | None:
    """`(bytes wanted, bytes there)` of a compiler's message that a program does not fit, None
    where it says something else.
    """
    found = _FULL.search(message)
    if found is None:
        return None
    return round(float(found[1]) * _UNITS[found[2]]), round(float(found[3]) * _UNITS[found[4]])


def _cache_file(config: Config, target: Target) -> Path:
    """Where a plan is kept, by all that it depends on: what is asked, the model's `config.json`,
    this program and its compilers.
    """
    from jaxtune.weights.abstract import abstract_source

    models = [name for name in (config.model.source, config.distill.teacher) if name]
    asked = {
        "schema": _SCHEMA,
        "config": config.model_dump(mode="json", exclude={"run", "checkpoint"}),
        "models": [abstract_source(name).config_json() for name in models],
        "target": target.name,
        "effort": os.environ.get("JAX_EXEC_TIME_OPTIMIZATION_EFFORT"),
        "program": _program(),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[
        :32
    ]
    return cache_root() / "plans" / f"{digest}.json"


@cache
def _program() -> list[str]:
    """A digest of the files of this package, and the versions of what it compiles with."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    found = [digest.hexdigest()]
    for name in ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} -")
    return found
