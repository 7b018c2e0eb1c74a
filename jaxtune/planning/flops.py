"""The FLOPs of a step, counted in its trace: every matrix product, as often as loops run it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

# Primitives that return the results of the trace inside them.
_CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint", "shard_map")
_PURE = (
    *_CALLS, "pallas_call", "dot_general", "reshape", "squeeze", "slice", "transpose",
    "convert_element_type", "name",
)  # fmt: skip


def count_flops(jaxpr: Any, times: int = 1, is_used: Sequence[bool] | None = None) -> int:
    """Return the FLOPs, over all devices, of the matrix products in a trace whose results are used.

    Args:
        jaxpr: the trace; the trace inside a `shard_map` is that of one device and counts for all.
        times: how often it runs.
        is_used: whether each of its results is used; all are by default.

    """
    total = 0
    outputs = zip(jaxpr.outvars, is_used or [True] * len(jaxpr.outvars), strict=True)
    used = {var for var, kept in outputs if kept and _is_var(var)}
    for equation in reversed(jaxpr.eqns):
        name, params = equation.primitive.name, equation.params
        kept = [var in used for var in equation.outvars]
        # A recomputed layer computes again what its remat policy kept, and nothing uses it.
        if not any(kept) and name in _PURE:
            continue
        used.update(var for var in equation.invars if _is_var(var))
        if name == "dot_general":
            total += times * _dot_flops(equation)
        elif name == "ragged_dot_general":
            rows = equation.invars[0].aval.shape[0]
            _, out, inner = equation.invars[1].aval.shape
            total += times * 2 * rows * out * inner
        inner_times = times
        if name == "scan":
            inner_times *= params["length"]
        elif name == "shard_map":
            inner_times *= params["mesh"].size
        elif name == "pallas_call":
            # Blocks that the mask lets a kernel skip count, as in other forms of attention.
            inner_times *= math.prod(params["grid_mapping"].grid)
        branches = [
            count_flops(part, inner_times, kept if name in _CALLS else None)
            for part in _traces_inside(params)
        ]
        total += max(branches, default=0) if name == "cond" else sum(branches)
    return total


def _is_var(var: Any) -> bool:
    return not isinstance(var, core.Literal)


def _traces_inside(params: dict[str, Any]) -> list[Any]:
    """Return the traces that an equation holds, without the rules for a function's derivative."""
    traces = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                traces.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                traces.append(item)
    return traces


def _dot_flops(equation: Any) -> int:
    """Return 2 x the size of the result x the size of the contraction."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    result = int(np.prod(equation.outvars[0].aval.shape, dtype=np.int64))
    return 2 * result * math.prod(left[axis] for axis in contracted)
