"""Arithmetic of a step, counted in its own trace: every matrix product, as often as loops run it."""

import math
from typing import Any

import numpy as np
from jax.extend import core


def count(jaxpr: Any, times: int = 1) -> int:
    """FLOPs of the matrix products in a trace, over all devices.

    Args:
        jaxpr: the trace; of a `shard_map` in it the inner one, which is of one device, counts for all.
        times: how often it runs.

    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += times * _product(equation)
        elif name == "ragged_dot_general":
            rows, (_, outputs, inputs) = equation.invars[0].aval.shape[0], equation.invars[1].aval.shape
            total += times * 2 * rows * outputs * inputs
        inner = times
        if name == "scan":
            inner *= params["length"]
        elif name == "shard_map":
            inner *= params["mesh"].size
        branches = [count(part, inner) for part in _inside(params)]
        total += max(branches, default=0) if name == "cond" else sum(branches)
    return total


def _inside(params: dict[str, Any]) -> list[Any]:
    """The traces that an equation holds; of a function with a rule for its derivative the function alone."""
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
