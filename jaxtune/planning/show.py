"""A plan as text."""

import yaml

from jaxtune.config.keys import nest
from jaxtune.planning.planner import Plan
from jaxtune.planning.roofline import ASSUMPTIONS
from jaxtune.planning.search import FittingConfig

_WIDTH = 40
_SMALLEST_SHOWN = 5e6  # bytes of a kind of collective


def plan_text(plan: Plan) -> str:
    """Return what a step takes of one device, what it sends, and how fast it can be at best."""
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    lines = [
        f"{plan.target}: {plan.devices} {'device' if plan.devices == 1 else 'devices'}, mesh "
        f"{axes or 'one device'}; {plan.tokens_per_step:,} tokens per step, remat {plan.remat}; "
        f"{plan.trainable_parameters:,} trainable parameters, {plan.frozen_parameters:,} frozen",
        "",
        _verdict(plan),
        "",
        *_memory(plan),
    ]
    if plan.largest_buffers:
        lines += ["", "largest temporary arrays"]
        lines += [
            f"  {gib(array['bytes'])}  {array['array']:<32} "
            f"{_shorten(array.get('from', ''))}".rstrip()
            for array in plan.largest_buffers
        ]
    if plan.peak_bytes is not None:
        lines += ["", *_communication(plan)]
    lines += [
        "",
        f"arithmetic: {plan.flops_per_token / 1e9:,.2f} GFLOP per token, "
        f"{plan.flops_per_step / 1e12:,.1f} TFLOP per step",
    ]
    if plan.seconds:
        lines += _speed(plan)
    if plan.advice:
        lines += ["", "to make it fit:", *(f"  - {advice}" for advice in plan.advice)]
    return "\n".join(lines)


def search_text(fitting: list[FittingConfig], on: str) -> str:
    """Return the best configurations as YAML to paste."""
    if not fitting:
        return (
            f"{on}: no configuration that was tried fits. Use more chips, shorter rows "
            "(data.max_length) or a lower train.batch_size."
        )
    lines = []
    for number, entry in enumerate(fitting, 1):
        plan = entry.plan
        assert plan.peak_bytes is not None
        assert plan.capacity_bytes is not None
        high, low = plan.tokens_per_second
        lines.append(
            f"# {number}. {low:,} to {high:,} tokens/s by the roofline, "
            f"{plan.peak_bytes / 2**30:.1f} of {plan.capacity_bytes / 2**30:.1f} GiB per chip"
        )
        sections = nest(entry.keys)
        text = yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=120)
        lines.append(text.rstrip())
    return "\n".join(lines)


def gib(size: float) -> str:
    """Return bytes as GiB in a column."""
    return f"{size / 2**30:8.2f} GiB"


def _verdict(plan: Plan) -> str:
    if plan.peak_bytes is None:
        assert plan.needed_bytes is not None
        assert plan.capacity_bytes is not None
        return (
            f"does NOT fit: the compiler needs {plan.needed_bytes / 2**30:.2f} GiB per chip, of "
            f"{plan.capacity_bytes / 2**30:.2f}"
        )
    peak = f"{plan.peak_bytes / 2**30:.2f} GiB per device"
    if plan.capacity_bytes is None:
        return f"takes {peak}; the plan does not know how much memory this machine has free"
    capacity = f"{plan.capacity_bytes / 2**30:.2f}"
    if plan.fits:
        return f"fits: {peak} of {capacity} ({plan.peak_bytes / plan.capacity_bytes:.0%})"
    counted = plan.compiler_peak_bytes
    if counted is None or counted > plan.capacity_bytes:
        return f"does NOT fit: {peak} of {capacity}"
    return (
        f"does NOT fit: {peak} of {capacity}; the compiler's own count is "
        f"{counted / 2**30:.2f}, so it may just run"
    )


def _memory(plan: Plan) -> list[str]:
    lines = [
        f"  {gib(plan.weight_bytes)}  frozen weights",
        f"  {gib(plan.state_bytes)}  trainable weights and the optimizer's moments",
    ]
    if (
        plan.temp_bytes is not None
        and plan.output_bytes is not None
        and plan.alias_bytes is not None
    ):
        lines.append(f"  {gib(plan.temp_bytes)}  activations, gradients and other temporaries")
        lines.append(
            f"  {gib(plan.output_bytes - plan.alias_bytes)}  results that replace no argument"
        )
    return lines


def _communication(plan: Plan) -> list[str]:
    if not plan.collectives:
        return ["communication: none"]
    lines = ["communication: bytes that one device sends per step, by mesh axis"]
    totals = {
        axes: sum(kind["bytes"] for kind in kinds.values())
        for axes, kinds in plan.collectives.items()
    }
    for axes in sorted(totals, key=lambda axes: -totals[axes]):
        what = ", ".join(
            f"{name} {kind['bytes'] / 1e9:.2f} in {kind['count']}"
            for name, kind in plan.collectives[axes].items()
            if kind["bytes"] > _SMALLEST_SHOWN
        )
        if what:
            lines.append(f"  {totals[axes] / 1e9:8.2f} GB  {axes:<16} {what}")
    return lines


def _speed(plan: Plan) -> list[str]:
    times = {name: f"{seconds:.3g} s" for name, seconds in plan.seconds.items()}
    fast, slow = plan.tokens_per_second
    return [
        f"roofline: {times['compute']} of products, {times['memory']} of reading weights, "
        f"{times['communication']} of communication",
        f"  a step takes {times['least']} to {times['most']}: {slow:,} to {fast:,} tokens/s, at "
        f"most {plan.mfu_bound:.0%} MFU",
        f"  assumptions: {ASSUMPTIONS}",
    ]


def _shorten(name: str) -> str:
    """Return the end of JAX's name of an array's origin."""
    name = name.replace("jit(step)/", "").replace("closed_call/", "")
    return name if len(name) <= _WIDTH else "..." + name[-_WIDTH:]
