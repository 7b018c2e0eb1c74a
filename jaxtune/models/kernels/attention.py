"""Grouped-query attention over packed segments or over a cache; its kernel is chosen here and
nowhere else.

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
from jaxtune.models.kernels.blockwise import attend_blockwise
from jaxtune.models.kernels.mask import Mask
from jaxtune.models.kernels.splash import Splash, supports_splash

Windows = tuple[int | None, ...]


class Kernel(NamedTuple):
    """A way to compute attention on one device.

    Attributes:
        run: a function of (arrays, q, k, v, mask).
        arrays: arrays of its own, the first argument of `run`.
        specs: a function of a mesh and the mesh axes of the queries' tokens that returns the
            partition of these arrays.

    """

    run: Callable[..., Float[Array, "B T N H"]]
    arrays: Any = ()
    specs: Callable[[AbstractMesh, Any], Any] = lambda mesh, seq: ()


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    cap: float | None = None,
    windows: Windows | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(cap(scale q k^T) + mask) v, the softmax in float32 (Vaswani et al. 2017;
    grouped: Ainslie et al. 2023).

    Keys and values are not repeated, and the scores of a row never exist at once. On a mesh every
    device computes its rows, its heads and its part of the queries; it sees the keys and values of
    the whole sequence, gathered over the context axis (Llama Team 2024, section 3.3.2).

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: which query sees which key.
        scale: the factor of the scores, 1 / sqrt(H) in most families.
        cap: c in c tanh(x / c) on the scores (Gemma 2); None: no cap.
        windows: the values that `mask.window` may have, if queries and keys are the same tokens and
            positions rise by one within a segment, as the kernels of TPUs and GPUs require; None
            otherwise.

    """
    if not is_multi_device():
        kernel = _kernel(q_BTNH, k_BSKH, scale, cap, windows)
        return kernel.run(kernel.arrays, q_BTNH, k_BSKH, v_BSKH, mask)
    mesh = jax.sharding.get_abstract_mesh()
    k_BSKH, v_BSKH = (
        _repeat_heads(part, q_BTNH.shape[2], axis_size(mesh, "act_heads"))
        for part in (k_BSKH, v_BSKH)
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
    specs = (kernel.specs(mesh, queries[1]), queries, keys, keys, masks)
    run = jax.shard_map(kernel.run, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return run(kernel.arrays, q_BTNH, k_BSKH, v_BSKH, mask)


def _kernel(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    scale: float,
    cap: float | None,
    windows: Windows | None,
    shards: int = 1,
) -> Kernel:
    """Choose the kernel for these arrays and the platform; `shards` is the number of parts the
    queries are split into.
    """
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    if windows and platform() == "tpu" and supports_splash(q_BTNH, shards):
        splash = Splash(q_BTNH.shape[1], groups, windows, cap, shards)
        return Kernel(partial(splash, scale=scale), splash.kernels, splash.specs)
    if windows and platform() == "gpu" and cudnn.supports_cudnn(q_BTNH, cap):
        return Kernel(
            lambda _, q, k, v, mask: cudnn.attend(q, k, v, mask, scale=scale, causal=shards == 1)
        )
    return Kernel(lambda _, q, k, v, mask: attend_blockwise(q, k, v, mask, scale=scale, cap=cap))


def _layout(mesh: AbstractMesh, seq: str | None, part: jax.Array, split: bool) -> PartitionSpec:
    return partition_spec(mesh, ("batch", seq, "act_heads" if split else None, None), part.shape)


def _repeat_heads(
    part_BSKH: Float[Array, "B S K H"], heads: int, devices: int
) -> Float[Array, "B S K H"]:
    """Repeat the heads of keys or values until they divide over the devices, if the queries' heads
    do.
    """
    kv_heads = part_BSKH.shape[2]
    times = math.lcm(kv_heads, devices) // kv_heads
    if times == 1 or heads % (kv_heads * times):
        return part_BSKH
    return jnp.repeat(part_BSKH, times, axis=2)
