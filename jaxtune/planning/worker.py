"""Compile a step and measure what it takes; run as a module, the process that `planning.planner`
starts.
"""

import re
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxtune.config.load import validated, with_keys
from jaxtune.config.schema import Config
from jaxtune.core.errors import RunError, UserError
from jaxtune.core.files import read_json, write_json
from jaxtune.core.hardware import Memory
from jaxtune.core.mesh import AXES
from jaxtune.core.runtime import use_own_precisions
from jaxtune.planning.collectives import arrays_in_memory, collectives
from jaxtune.planning.compiler_errors import largest_buffers, memory_shortage
from jaxtune.planning.flops import count_flops
from jaxtune.planning.lower import Lowered
from jaxtune.planning.roofline import estimate_step, sum_by_axis
from jaxtune.planning.target import Target, parse_target
from jaxtune.tracking.metrics_log import flops_per_token

_SHOWN = 6


def measure(config: Config, target: Target) -> dict[str, Any]:
    """Compile the step and return the fields of a `Plan`.

    Raises:
        UserError: see `planning.planner`.
        RunError: the compiler failed, but not for lack of memory.

    """
    chip = target.chip
    if chip is None:
        lowered = Lowered(config, None)
    else:
        if config.model.compute_dtype == "auto":
            config = with_keys(config, {"model.compute_dtype": "bfloat16"})
        lowered = Lowered(config, target.find_devices(), chip.memory)
    flops = count_flops(lowered.traced.jaxpr.jaxpr)
    fields = _describe(lowered, target) | {
        "flops_per_step": flops,
        "flops_per_token": flops / lowered.tokens,
    }
    began = time.monotonic()
    try:
        program = lowered.compile(target.platform if chip else None)
    except jax.errors.JaxRuntimeError as error:
        fields["compile_seconds"] = round(time.monotonic() - began, 1)
        fields |= _does_not_fit(str(error), target)
    else:
        fields["compile_seconds"] = round(time.monotonic() - began, 1)
        fields |= _measure_memory(program, target)
        fields |= _measure_communication(program.as_text(), lowered, flops, target)
    return fields | {"advice": [] if fields["fits"] else _advice(config, fields, lowered)}


def _describe(lowered: Lowered, target: Target) -> dict[str, Any]:
    return {
        "target": target.name,
        "mesh": dict(lowered.mesh.shape),
        "devices": lowered.mesh.size,
        "capacity_bytes": target.chip.memory if target.chip else None,
        "weight_bytes": lowered.frozen_bytes,
        "state_bytes": lowered.state_bytes,
        "trainable_parameters": lowered.trainable,
        "frozen_parameters": lowered.frozen,
        "tokens_per_step": lowered.tokens,
        "remat": lowered.remat,
    }


def _does_not_fit(message: str, target: Target) -> dict[str, Any]:
    """Return the fields that a compiler's message gives.

    Raises:
        RunError: it is about something else than memory.

    """
    shortage = memory_shortage(message)
    if shortage is None:
        raise RunError(f"{target.name}: the compiler failed: {message[:2000]}")
    return {
        "fits": False,
        "peak_bytes": None,
        "needed_bytes": shortage.needed,
        "capacity_bytes": shortage.available,
        "largest_buffers": largest_buffers(message, _SHOWN),
    }


def _measure_memory(program: Any, target: Target) -> dict[str, Any]:
    memory = Memory.of(program)
    assert memory is not None
    names = ("argument", "output", "alias", "temp", "peak")
    peak = getattr(program.memory_analysis(), "peak_memory_in_bytes", None)
    return {
        **{f"{name}_bytes": getattr(memory, name) for name in names},
        "fits": target.chip is None or memory.peak <= target.chip.memory,
        "compiler_peak_bytes": peak or None,
    }


def _measure_communication(
    text: str, lowered: Lowered, flops: int, target: Target
) -> dict[str, Any]:
    mesh, devices, chip = dict(lowered.mesh.shape), lowered.mesh.size, target.chip
    exchanged = collectives(text, mesh)
    fields: dict[str, Any] = {
        "collectives": sum_by_axis(exchanged),
        "largest_collectives": [
            {
                "kind": collective.kind,
                "axes": list(collective.axes),
                "array": collective.shape,
                "times": collective.times,
                "bytes": collective.sent,
            }
            for collective in exchanged[:_SHOWN]
        ],
        "largest_buffers": _largest_temporaries(text),
    }
    if chip is None:
        return fields
    roofline = estimate_step(
        chip,
        flops=flops / devices,
        weight_bytes=lowered.frozen_bytes * mesh["fsdp"] * lowered.passes,
        exchanged=exchanged,
        slow_axes=_slow_axes(mesh, target),
    )
    names = ("compute", "memory", "communication", "least", "most")
    useful = flops_per_token(lowered.frozen, lowered.trainable) * lowered.tokens
    return fields | {
        "seconds": {name: float(f"{getattr(roofline, name):.3g}") for name in names},
        "tokens_per_second": [
            round(lowered.tokens / roofline.least),
            round(lowered.tokens / roofline.most),
        ],
        "mfu_bound": round(useful / (roofline.least * devices * chip.flops), 3),
    }


def _slow_axes(mesh: dict[str, int], target: Target) -> set[str]:
    """Return the axes that cross the network between slices or, of GPUs, between hosts of eight."""
    if target.platform == "tpu":
        return {"slices"} if mesh["slices"] > 1 else set()
    reach, slow = 1, set()
    for name in reversed(AXES):
        reach *= mesh[name]
        if mesh[name] > 1 and reach > 8:
            slow.add(name)
    return slow


def _largest_temporaries(text: str) -> list[dict[str, Any]]:
    """Return the largest arrays that a program keeps in memory, each shape once, with JAX's name
    of where it comes from.
    """
    arrays: dict[str, tuple[int, str]] = {}
    for shape, size, line in arrays_in_memory(text):
        name = re.search(r'op_name="([^"]*)"', line)
        if shape not in arrays or (name and not arrays[shape][1]):
            arrays[shape] = size, name[1] if name else ""
    largest = sorted(arrays.items(), key=lambda item: -item[1][0])[:_SHOWN]
    return [{"array": shape, "bytes": size, "from": name} for shape, (size, name) in largest]


def _advice(config: Config, fields: dict[str, Any], lowered: Lowered) -> list[str]:
    """Return what would make a run fit that does not, the most effective first."""
    train, mesh, capacity = config.train, fields["mesh"], fields["capacity_bytes"]
    fixed = fields["weight_bytes"] + fields["state_bytes"]
    can_quantize = config.model.dtype not in ("nf4", "int8") and lowered.frozen > 0
    rows, fewest_rows = train.micro_batch_size or train.batch_size, lowered.shards["batch"]
    advice = {
        f"weights and optimizer alone take {fixed / 2**30:.1f} GiB of {capacity / 2**30:.1f} per "
        "chip: use more chips" + (", or model.dtype=nf4 or int8" if can_quantize else ""): (
            fixed > capacity
        ),
        "mesh.data copies the weights: give its devices to mesh.fsdp": (
            mesh["data"] > 1 or mesh["slices"] > 1
        ),
        "train.remat=full keeps only the input of each layer": (
            lowered.remat not in ("full", "offload")
        ),
        "train.remat=offload keeps the inputs of the layers in host memory": (
            lowered.remat != "offload"
        ),
        f"train.micro_batch_size={max(fewest_rows, rows // 2)} computes fewer rows at a time; the "
        "numbers stay the same": rows > fewest_rows,
        "model.dtype=int8 or nf4 keeps the frozen weights in a half or a quarter of their bytes": (
            can_quantize and fixed <= capacity
        ),
        "mesh.tensor=2 or 4 shards the gathered weights of a layer, its activations and the "
        "logits": mesh["tensor"] == 1 and mesh["fsdp"] > 1,
        "mesh.context=2 or more shards each sequence, or a lower data.max_length shortens it": (
            mesh["context"] == 1 and fields["devices"] > 1
        ),
    }
    return [text for text, applies in advice.items() if applies]


def main(request_path: str, answer_path: str) -> None:
    """Read a request, and write the fields of its plan or an error."""
    use_own_precisions()
    request = read_json(Path(request_path))
    try:
        answer = measure(validated(request["config"]), parse_target(request["on"]))
    except (UserError, RunError) as error:
        answer = {"error": str(error), "is_user_error": isinstance(error, UserError)}
    write_json(Path(answer_path), answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
