"""Grouped-query attention over packed segments or over a cache; the one place where its kernel is
chosen.

Shape letters: B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from jaxtune.core.hardware import platform
from jaxtune.core.sharding import axis_size, is_multi_device, partition_spec
from jaxtune.models.kernels import cudnn
from jaxtune.models.kernels.blockwise import blockwise
from jaxtune.models.kernels.mask import Mask
from jaxtune.models.kernels.splash import Splash, splashes

Windows = tuple[int | None, ...]


class Kernel(NamedTuple):
    """A way to compute attention on one device.

    Attributes:
        run: a function of (arrays, q, k, v, mask).
        arrays: what it brings along.
        specs: the partition of these over a mesh, by the axes that cut the queries.

    """

    run: Callable[..., Float[Array, "B T N H"]]
    arrays: Any = ()
    specs: Callable[[AbstractMesh, Any], Any] = lambda mesh, seq: ()


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    scale: float,
    cap: float | None = None,
    windows: Windows | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(cap(scale q k^T) + mask) v, the softmax in float32 (Vaswani et al. 2017; grouped:
    Ainslie et al. 2023).

    Keys and values are not repeated, and the scores of a row never exist at once. On a mesh every
    device attends for its rows, its heads and its part of the queries; of the sequence it sees all
    keys and values, gathered over the context axis (Llama Team 2024, section 3.3.2).

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: which query sees which key.
        scale: of the scores, 1 / sqrt(H) in most families.
        cap: c in c tanh(x / c) on the scores (Gemma 2); None: no cap.
        windows: the values that `mask.window` may have, where queries and keys are the same tokens
            and positions rise by one within a segment, which the kernels of TPUs and GPUs rely on;
            None where that is not so.

    """
    if not is_multi_device():
        kernel = _kernel(q_BTNH, k_BSKH, scale, cap, windows)
        return kernel.run(kernel.arrays, q_BTNH, k_BSKH, v_BSKH, mask)
    mesh = jax.sharding.get_abstract_mesh()
    k_BSKH, v_BSKH = (
        _repeated(part, q_BTNH.shape[2], axis_size(mesh, "act_heads")) for part in (k_BSKH, v_BSKH)
    )
    split = k_BSKH.shape[2] % axis_size(mesh, "act_heads") == 0
    queries, keys = (
        _layout(mesh, seq, part, split) for seq, part in (("seq", q_BTNH), (None, k_BSKH))
    )
    rows: Any = PartitionSpec(*queries[:2]), PartitionSpec(*keys[:2])
    window: Any = None if mask.window is None else PartitionSpec()
    masks = Mask(rows[0], rows[1], rows[0], rows[1], window)
    shards = 1 if queries[1] is None else axis_size(mesh, "seq")
    kernel = _kernel(q_BTNH, k_BSKH, scale, cap, windows, shards)
    places = (kernel.specs(mesh, queries[1]), queries, keys, keys, masks)
    over = jax.shard_map(kernel.run, mesh=mesh, in_specs=places, out_specs=queries, check_vma=False)
    return over(kernel.arrays, q_BTNH, k_BSKH, v_BSKH, mask)


def _kernel(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    scale: float,
    cap: float | None,
    windows: Windows | None,
    shards: int = 1,
) -> Kernel:
    """The kernel for these arrays and the platform; `shards` is into how many parts the queries
    are cut.
    """
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    if windows and platform() == "tpu" and splashes(q_BTNH, shards):
        splash = Splash(q_BTNH.shape[1], groups, windows, cap, shards)
        return Kernel(partial(splash, scale=scale), splash.kernels, splash.specs)
    if windows and platform() == "gpu" and cudnn.suits(q_BTNH, cap):
        return Kernel(
            lambda _, q, k, v, mask: cudnn.attend(q, k, v, mask, scale=scale, causal=shards == 1)
        )
    return Kernel(lambda _, q, k, v, mask: blockwise(q, k, v, mask, scale=scale, cap=cap))


def _layout(mesh: AbstractMesh, seq: str | None, part: jax.Array, split: bool) -> PartitionSpec:
    return partition_spec(mesh, ("batch", seq, "act_heads" if split else None, None), part.shape)


def _repeated(
    part_BSKH: Float[Array, "B S K H"], heads: int, devices: int
) -> Float[Array, "B S K H"]:
    """Keys or values, each head so often that the heads divide over the devices, where the
    queries' heads do.
    """
    kv_heads = part_BSKH.shape[2]
    times = math.lcm(kv_heads, devices) // kv_heads
    return (
        part_BSKH
        if times == 1 or heads % (kv_heads * times)
        else jnp.repeat(part_BSKH, times, axis=2)
    )
