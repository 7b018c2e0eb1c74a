"""A plan as a person reads it."""

import yaml

from jaxtune.config.keys import nest
from jaxtune.planning.planner import Plan
from jaxtune.planning.roofline import ASSUMPTIONS
from jaxtune.planning.search import Found

_WIDTH = 40


def plan_text(made: Plan) -> str:
    """What a step takes of one device, what it sends, and how fast it can be at best."""
    mesh = (
        " x ".join(f"{name} {size}" for name, size in made.mesh.items() if size > 1) or "one device"
    )
    lines = [
        f"{made.target}: {made.devices} {'device' if made.devices == 1 else 'devices'}, mesh "
        f"{mesh}; {made.tokens_per_step:,} tokens a step, "
        f"remat {made.remat}; {made.trainable_parameters:,} parameters train, "
        f"{made.frozen_parameters:,} are frozen",
        "",
        _verdict(made),
        "",
        *_memory(made),
    ]
    if made.largest_buffers:
        lines += ["", "largest arrays between"]
        lines += [
            f"  {gib(one['bytes'])}  {one['array']:<32} {_short(one.get('from', ''))}".rstrip()
            for one in made.largest_buffers
        ]
    if made.peak_bytes is not None:
        lines += ["", *_sent(made)]
    lines += [
        "",
        f"arithmetic: {made.flops_per_token / 1e9:,.2f} GFLOP a token, "
        f"{made.flops_per_step / 1e12:,.1f} TFLOP a step",
    ]
    if made.seconds:
        lines += _speed(made)
    if made.advice:
        lines += ["", "to make it fit:", *(f"  - {one}" for one in made.advice)]
    return "\n".join(lines)


def search_text(found: list[Found], on: str) -> str:
    """The best configurations as YAML to paste."""
    if not found:
        return f"{on}: nothing that was tried fits. Take more chips, shorter rows (data.max_length) or a lower train.batch_size."
    lines = []
    for number, one in enumerate(found, 1):
        assert one.plan.peak_bytes is not None
        assert one.plan.capacity_bytes is not None
        low, high = one.plan.tokens_per_second[1], one.plan.tokens_per_second[0]
        lines.append(
            f"# {number}. {low:,} to {high:,} tokens/s by the roofline, "
            f"{one.plan.peak_bytes / 2**30:.1f} of "
            f"{one.plan.capacity_bytes / 2**30:.1f} GiB a chip"
        )
        lines.append(
            yaml.safe_dump(
                nest(one.keys), sort_keys=False, default_flow_style=None, width=120
            ).rstrip()
        )
    return "\n".join(lines)


def gib(size: float) -> str:
    """Bytes as GiB in a column."""
    return f"{size / 2**30:8.2f} GiB"


def _verdict(made: Plan) -> str:
    if made.peak_bytes is None:
        assert made.needed_bytes is not None
        assert made.capacity_bytes is not None
        return f"does NOT fit: the compiler wants {made.needed_bytes / 2**30:.2f} GiB a chip and there are {made.capacity_bytes / 2**30:.2f}"
    peak = f"{made.peak_bytes / 2**30:.2f} GiB a device"
    if made.capacity_bytes is None:
        return f"takes {peak}; what this machine has is for you to know"
    share = made.peak_bytes / made.capacity_bytes
    if made.fits:
        return f"fits: {peak} of {made.capacity_bytes / 2**30:.2f} ({share:.0%})"
    tight = made.compiler_peak_bytes is not None and made.compiler_peak_bytes <= made.capacity_bytes
    note = (
        f"; by the compiler's own count {made.compiler_peak_bytes / 2**30:.2f}, so it may just run"
        if tight and made.compiler_peak_bytes
        else ""
    )
    return f"does NOT fit: {peak} and there are {made.capacity_bytes / 2**30:.2f}{note}"


def _memory(made: Plan) -> list[str]:
    lines = [
        f"  {gib(made.weight_bytes)}  frozen weights",
        f"  {gib(made.state_bytes)}  what trains, and the optimizer's moments",
    ]
    if (
        made.temp_bytes is not None
        and made.output_bytes is not None
        and made.alias_bytes is not None
    ):
        lines.append(
            f"  {gib(made.temp_bytes)}  activations, gradients and all else that comes and goes"
        )
        lines.append(
            f"  {gib(made.output_bytes - made.alias_bytes)}  results that take no argument's place"
        )
    return lines


def _sent(made: Plan) -> list[str]:
    if not made.collectives:
        return ["communication: none"]
    lines = ["communication: bytes that one device sends in a step, by mesh axis"]
    for axes, kinds in sorted(
        made.collectives.items(), key=lambda one: -sum(kind["bytes"] for kind in one[1].values())
    ):
        what = ", ".join(
            f"{name} {kind['bytes'] / 1e9:.2f} in {kind['count']}"
            for name, kind in kinds.items()
            if kind["bytes"] > 5e6
        )
        if what:
            lines.append(
                f"  {sum(kind['bytes'] for kind in kinds.values()) / 1e9:8.2f} GB  {axes:<16} "
                f"{what}"
            )
    return lines


def _speed(made: Plan) -> list[str]:
    times = {name: f"{seconds:.3g} s" for name, seconds in made.seconds.items()}
    fast, slow = made.tokens_per_second
    return [
        f"roofline: {times['compute']} of products, {times['memory']} of reading weights, "
        f"{times['communication']} of communication",
        f"  a step takes {times['least']} to {times['most']}: {slow:,} to {fast:,} tokens/s, at "
        f"most {made.mfu_bound:.0%} MFU",
        f"  assumed: {ASSUMPTIONS}",
    ]


def _short(name: str) -> str:
    """The end of JAX's name for where an array comes from."""
    name = name.replace("jit(step)/", "").replace("closed_call/", "")
    return name if len(name) <= _WIDTH else "..." + name[-_WIDTH:]
