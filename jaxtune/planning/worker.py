"""Compiling a step and reading what it takes; run as a module it is the process that
`planning.planner` starts.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from jaxtune.config.load import validated
from jaxtune.config.schema import Config
from jaxtune.core.errors import RunError, UserError
from jaxtune.core.hardware import Chip
from jaxtune.planning.target import Target, parse

_SHOWN = 6


def measured(config: Config, target: Target) -> dict[str, Any]:
    """The fields of a `Plan`.

    Raises:
        UserError: see `planning.planner`.
        RunError: the compiler failed, but not for lack of memory.

    """
    import jax

    from jaxtune.core.hardware import Memory
    from jaxtune.planning.flops import count
    from jaxtune.planning.lower import Lowered
    from jaxtune.planning.planner import memory_wanted

    chip = target.chip
    if chip is not None and config.model.compute_dtype == "auto":
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"compute_dtype": "bfloat16"})}
        )
    devices = target.find() if chip else None
    lowered = Lowered(config, devices, chip.memory if chip else None)
    mesh, size = dict(lowered.mesh.shape), lowered.mesh.size
    flops = count(lowered.traced.jaxpr.jaxpr)
    found: dict[str, Any] = {
        "target": target.name,
        "mesh": mesh,
        "devices": size,
        "capacity_bytes": chip.memory if chip else None,
        "weight_bytes": lowered.frozen_bytes,
        "state_bytes": lowered.state_bytes,
        "trainable_parameters": lowered.trainable,
        "frozen_parameters": lowered.frozen,
        "tokens_per_step": lowered.tokens,
        "remat": lowered.remat,
        "flops_per_step": flops,
        "flops_per_token": flops / lowered.tokens,
    }
    began = time.monotonic()
    try:
        program = lowered.compile(target.platform if chip else None)
    except jax.errors.JaxRuntimeError as error:
        wanted = memory_wanted(str(error))
        if wanted is None:
            raise RunError(f"{target.name}: the compiler failed: {str(error)[:2000]}") from None
        found |= {
            "fits": False,
            "peak_bytes": None,
            "needed_bytes": wanted[0],
            "capacity_bytes": wanted[1],
        }
        found |= {"largest_buffers": _buffers(str(error))}
        return found | {
            "compile_seconds": round(time.monotonic() - began, 1),
            "advice": _advice(config, found, lowered),
        }
    seconds = time.monotonic() - began
    memory = Memory.of(program)
    assert memory is not None
    parts = {
        f"{name}_bytes": getattr(memory, name)
        for name in ("argument", "output", "alias", "temp", "peak")
    }
    found |= parts | {
        "fits": chip is None or memory.peak <= chip.memory,
        "compile_seconds": round(seconds, 1),
    }
    found["compiler_peak_bytes"] = (
        getattr(program.memory_analysis(), "peak_memory_in_bytes", None) or None
    )
    found |= _communication(program, lowered, flops, chip, target)
    return found | {"advice": _advice(config, found, lowered)}


def _communication(
    program: Any, lowered: Any, flops: int, chip: Chip | None, target: Target
) -> dict[str, Any]:
    from jaxtune.planning.collectives import collectives
    from jaxtune.planning.roofline import by_axis, estimate
    from jaxtune.tracking.metrics_log import flops_per_token

    mesh, text = dict(lowered.mesh.shape), program.as_text()
    exchanged = collectives(text, mesh)
    shown = [
        {
            "kind": one.kind,
            "axes": list(one.axes),
            "array": one.shape,
            "times": one.times,
            "bytes": one.sent,
        }
        for one in exchanged[:_SHOWN]
    ]
    found: dict[str, Any] = {
        "collectives": by_axis(exchanged),
        "largest_collectives": shown,
        "largest_buffers": _temporaries(text),
    }
    if chip is None:
        return found
    gathered = lowered.frozen_bytes * mesh["fsdp"]
    crossing = _crossing(mesh, target)
    rough = estimate(chip, flops, lowered.mesh.size, gathered, lowered.passes, exchanged, crossing)
    times = {
        name: getattr(rough, name)
        for name in ("compute", "memory", "communication", "least", "most")
    }
    useful = flops_per_token(lowered.frozen, lowered.trainable) * lowered.tokens
    return found | {
        "seconds": {name: float(f"{value:.3g}") for name, value in times.items()},
        "tokens_per_second": [
            round(lowered.tokens / rough.least),
            round(lowered.tokens / rough.most),
        ],
        "mfu_bound": round(useful / (rough.least * lowered.mesh.size * chip.flops), 3),
    }


def _crossing(mesh: dict[str, int], target: Target) -> dict[str, bool]:
    """Whether each axis crosses the network between slices or, of GPUs, between hosts of eight."""
    from jaxtune.core.mesh import AXES

    if target.platform == "tpu":
        return {name: name == "slices" and mesh[name] > 1 for name in AXES}
    reach, found = 1, {}
    for name in reversed(AXES):
        reach *= mesh[name]
        found[name] = mesh[name] > 1 and reach > 8
    return found


def _buffers(message: str) -> list[dict[str, Any]]:
    """The largest buffers that a compiler names where a program does not fit."""
    found = re.findall(r"Size: ([\d.]+)([KMGT]).*?Shape: (\S+)", message, re.DOTALL)
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return [
        {"array": shape, "bytes": round(float(size) * units[unit])}
        for size, unit, shape in found[:_SHOWN]
    ]


def _temporaries(text: str) -> list[dict[str, Any]]:
    """The largest arrays that the program makes outside of its fusions, each shape once; where
    it comes from by JAX's name.
    """
    from jaxtune.planning.collectives import bodies

    found: dict[str, tuple[int, str]] = {}
    for shape, size, line in bodies(text):
        name = re.search(r'op_name="([^"]*)"', line)
        if shape not in found or (name and not found[shape][1]):
            found[shape] = size, name[1] if name else ""
    largest = sorted(found.items(), key=lambda one: -one[1][0])[:_SHOWN]
    return [{"array": shape, "bytes": size, "from": name} for shape, (size, name) in largest]


def _advice(config: Config, found: dict[str, Any], lowered: Any) -> list[str]:
    """What would bring a run that does not fit nearer to fitting, the most effective first."""
    if found["fits"]:
        return []
    train, mesh, capacity = config.train, found["mesh"], found["capacity_bytes"]
    fixed = found["weight_bytes"] + found["state_bytes"]
    advice = []
    if fixed > capacity:
        advice.append(
            f"weights and optimizer alone take {fixed / 2**30:.1f} GiB of {capacity / 2**30:.1f} "
            "a chip: take more chips"
            + (
                ""
                if config.model.dtype in ("nf4", "int8") or lowered.frozen == 0
                else ", or model.dtype=nf4 or int8"
            )
        )
    if mesh["data"] > 1 or mesh["slices"] > 1:
        advice.append("mesh.data copies the weights: give its devices to mesh.fsdp")
    if lowered.remat not in ("full", "offload"):
        advice.append("train.remat=full keeps only each layer's input")
    if lowered.remat != "offload":
        advice.append("train.remat=offload keeps the layers' inputs in the host's memory")
    rows = train.micro_batch_size or train.batch_size
    least = lowered.shares["batch"]
    if rows > least:
        advice.append(
            f"train.micro_batch_size={max(least, rows // 2)} computes fewer rows at a time; the "
            "numbers stay the same"
        )
    if config.model.dtype not in ("nf4", "int8") and lowered.frozen and fixed <= capacity:
        advice.append(
            "model.dtype=int8 or nf4 keeps the frozen weights in a half or a quarter of their bytes"
        )
    if mesh["tensor"] == 1 and mesh["fsdp"] > 1:
        advice.append(
            "mesh.tensor=2 or 4 cuts a layer's gathered weights, its activations and the head's "
            "logits"
        )
    if mesh["context"] == 1 and found["devices"] > 1:
        advice.append(
            "mesh.context=2 or more cuts each sequence, or a lower data.max_length shortens it"
        )
    return advice


def main(asked: str, answer: str) -> None:
    """Read a request, write the answer or what went wrong."""
    from jaxtune.core.files import write_json

    request = json.loads(Path(asked).read_text())
    try:
        found = measured(validated(request["config"]), parse(request["on"]))
    except (UserError, RunError) as error:
        found = {"error": str(error), "yours": isinstance(error, UserError)}
    write_json(Path(answer), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
