"""Arithmetic of a step, counted in its own trace: every matrix product, as often as loops run
it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "remat2",
    "checkpoint",
    "shard_map",
)  # whose results are those of the trace within
_PURE = (
    *_CALLS,
    "pallas_call",
    "dot_general",
    "reshape",
    "squeeze",
    "slice",
    "transpose",
    "convert_element_type",
    "name",
)


def count(jaxpr: Any, times: int = 1, wanted: Sequence[bool] | None = None) -> int:
    """FLOPs of the matrix products in a trace whose results are used, over all devices.

    Args:
        jaxpr: the trace; of a `shard_map` in it the inner one, which is of one device, counts for
            all.
        times: how often it runs.
        wanted: which of its results are used; all by default.

    """
    total = 0
    used = {
        var
        for var, kept in zip(jaxpr.outvars, wanted or [True] * len(jaxpr.outvars), strict=True)
        if kept and _is_var(var)
    }
    for equation in reversed(jaxpr.eqns):
        name, params = equation.primitive.name, equation.params
        kept = [var in used for var in equation.outvars]
        if (
            not any(kept) and name in _PURE
        ):  # such as what a remat policy keeps, in the recomputed layer
            continue
        used.update(var for var in equation.invars if _is_var(var))
        if name == "dot_general":
            total += times * _product(equation)
        elif name == "ragged_dot_general":
            rows, (_, outputs, inputs) = (
                equation.invars[0].aval.shape[0],
                equation.invars[1].aval.shape,
            )
            total += times * 2 * rows * outputs * inputs
        inner = times
        if name == "scan":
            inner *= params["length"]
        elif name == "shard_map":
            inner *= params["mesh"].size
        elif (
            name == "pallas_call"
        ):  # blocks that the mask lets a kernel pass over are counted, as in other forms of attention
            inner *= math.prod(params["grid_mapping"].grid)
        branches = [
            count(part, inner, kept if name in _CALLS else None) for part in _inside(params)
        ]
        total += max(branches, default=0) if name == "cond" else sum(branches)
    return total


def _is_var(var: Any) -> bool:
    return not isinstance(var, core.Literal)


def _inside(params: dict[str, Any]) -> list[Any]:
    """The traces that an equation holds; of a function with a rule for its derivative the
    function alone.
    """
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _product(equation: Any) -> int:
    """2 x sizes of the result x sizes that are summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    result = int(np.prod(equation.outvars[0].aval.shape, dtype=np.int64))
    return 2 * result * math.prod(left[axis] for axis in contracted)
