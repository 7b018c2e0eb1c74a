"""The plan of a run: its step, compiled for a target in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtune.config.schema import Config
from jaxtune.core.errors import RunError, UserError
from jaxtune.core.files import cache_root, read_json, write_json
from jaxtune.core.locks import locked
from jaxtune.planning.fingerprint import fingerprint
from jaxtune.planning.target import Target, parse_target

_TIMEOUT = 1800
_SCHEMA = 2


@dataclass(frozen=True)
class Plan:
    """The memory, communication and time of a step. Bytes are those of one device.

    Attributes:
        target: the hardware it was compiled for.
        mesh: sizes of the mesh's axes.
        devices: the number of devices.
        fits: whether `peak_bytes` is within `capacity_bytes`.
        capacity_bytes: bytes that a program may use; None for this machine.
        peak_bytes: arguments + outputs - aliases + temporaries, an upper bound. None where the
            compiler gave up; `needed_bytes` is then what the program needs.
        compiler_peak_bytes: the compiler's own peak, which counts buffers that are never alive
            together only once.
        argument_bytes, output_bytes, alias_bytes, temp_bytes: the parts of `peak_bytes`.
        weight_bytes, state_bytes: the parts of `argument_bytes`: the frozen weights, and the
            trainable ones with the optimizer's moments.
        remat: the remat policy, as given or as chosen by train.remat=auto.
        tokens_per_step: positions of a global batch.
        flops_per_step, flops_per_token: FLOPs of the matrix products over all devices, with
            adapters and recomputation.
        collectives: bytes sent by one device and the number of collectives, by mesh axes and kind.
        largest_collectives: the few largest collectives.
        largest_buffers: names and bytes of the largest temporaries.
        seconds: `compute`, `memory`, `communication`, `least`, `most` of the roofline; empty for
            this machine.
        tokens_per_second: over all devices, at `least` and at `most`.
        mfu_bound: MFU at `least`, of 4 FLOPs per frozen parameter and token and 6 per trainable
            one.
        compile_seconds: how long the compilation took.
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
    """Compile the step of a run for a target, or read an earlier plan from the cache.

    Args:
        config: the resolved configuration; of the model only its `config.json` is read, of the data
            nothing.
        on: `here`, a TPU such as `v5e:4x4`, `v5p:4x4x4` or `2*v6e:8x8`, or GPUs such as `h100:16`.

    Raises:
        UserError: no such target or model, a configuration that does not fit the mesh, or the
            target's compiler is not installed.
        RunError: the compiler failed otherwise.

    """
    result = plans([config], on)[0]
    if isinstance(result, Exception):
        raise result
    return result


def plans(
    configs: Sequence[Config], on: str, parallel: int | None = None
) -> list[Plan | Exception]:
    """Return the plans of several configurations, compiled in parallel; an error stands for a plan
    that cannot be made.

    Args:
        configs: the configurations.
        on: the target.
        parallel: processes at a time; one per core by default.

    """
    target = parse_target(on)
    with ThreadPoolExecutor(parallel or default_parallel()) as pool:
        return list(pool.map(lambda config: _try_plan(config, target), configs))


def default_parallel() -> int:
    """Return how many compilers run in parallel: one per core, as each may take a few GB."""
    return max(1, min(os.cpu_count() or 1, 8))


def _try_plan(config: Config, target: Target) -> Plan | Exception:
    try:
        if target.kind is None:
            return Plan(**_measure_here(config, target))
        path = _cache_file(config, target)
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                write_json(path, _measure_in_child(config, target))
        return Plan(**read_json(path))
    except (UserError, RunError) as error:
        return error


def _measure_here(config: Config, target: Target) -> dict[str, Any]:
    from jaxtune.planning.worker import measure

    return measure(config, target)


def _measure_in_child(config: Config, target: Target) -> dict[str, Any]:
    """Return what `measure` returns in a process with the target's environment."""
    request = {"config": config.model_dump(mode="json", exclude_unset=True), "on": target.name}
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("XLA_FLAGS")
    } | target.environment()
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        write_json(asked, request)
        command = [sys.executable, "-m", "jaxtune.planning.worker", str(asked), str(answer)]
        try:
            worker = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise RunError(
                f"{target.name}: the compiler had not finished after {_TIMEOUT // 60} minutes."
            ) from None
        if not answer.exists():
            last = "\n".join(worker.stderr.strip().splitlines()[-15:])
            raise RunError(
                f"{target.name}: the compiling process ended with status {worker.returncode}:\n"
                f"{last}"
            )
        result = read_json(answer)
    if "error" in result:
        raise (UserError if result["is_user_error"] else RunError)(result["error"])
    return result


def _cache_file(config: Config, target: Target) -> Path:
    """Return the cached plan's path, named by a digest of all that the plan depends on: the
    request, the models' `config.json`, the code of the step and its compilers.
    """
    from jaxtune.weights.abstract import abstract_source

    models = [name for name in (config.model.source, config.distill.teacher) if name]
    asked = {
        "schema": _SCHEMA,
        "config": config.model_dump(mode="json", exclude={"run", "checkpoint"}),
        "models": [abstract_source(name).config_json() for name in models],
        "target": target.name,
        "effort": os.environ.get("JAX_EXEC_TIME_OPTIMIZATION_EFFORT"),
        "program": fingerprint(),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[
        :32
    ]
    return cache_root() / "plans" / f"{digest}.json"
