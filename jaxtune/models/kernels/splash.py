"""Splash attention: JAX's Pallas kernel for TPUs, over packed segments, one key/value head for its
group of query heads.

Shape letters as in `models.kernels.attention`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxtune.models.kernels.mask import Mask
from jaxtune.models.remat import ATTENTION

LANES = 128
BLOCK = 512


def supports_splash(q_BTNH: jax.Array, shards: int) -> bool:
    """Return whether the kernel accepts such queries: bfloat16, the only precision of its products,
    and a whole number of lanes of tokens per shard.
    """
    return q_BTNH.dtype == jnp.bfloat16 and q_BTNH.shape[1] % (LANES * shards) == 0


class Splash:
    """The kernels of an attention, one for each window of the model's layers.

    Args:
        tokens: queries of a whole row, and its keys.
        groups: query heads per key/value head.
        windows: the windows; None stands for no window.
        cap: c in c tanh(x / c) on the scores; None: no cap.
        shards: number of parts the queries are split into.
        interpret: whether to interpret the kernel, where there is no TPU.

    """

    def __init__(
        self,
        tokens: int,
        groups: int,
        windows: tuple[int | None, ...],
        cap: float | None,
        shards: int = 1,
        *,
        interpret: bool = False,
    ) -> None:
        block = next(size for size in (BLOCK, BLOCK // 2, LANES) if tokens // shards % size == 0)
        sizes = pallas.BlockSizes(block, block, block, block, block, block, block, block)
        self.windows = windows
        self.kernels = []
        for window in windows:
            shape = (tokens, tokens)
            mask = (
                pallas.CausalMask(shape)
                if window is None
                else pallas.LocalMask(shape, (window - 1, 0), 0)
            )
            kernel = pallas.make_splash_mqa(
                pallas.MultiHeadMask([mask] * groups),
                block_sizes=sizes,
                attn_logits_soft_cap=cap,
                interpret=interpret,
                head_shards=1,
                q_seq_shards=shards,
                residual_checkpoint_name=ATTENTION,
            )
            self.kernels.append(kernel)

    def specs(self, mesh: AbstractMesh, seq: Any) -> list[Any]:
        """Return the partitions of the kernels' own arrays, the queries being sharded over the mesh
        axes `seq`.
        """
        return [
            kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, seq)))
            for kernel in self.kernels
        ]

    def __call__(
        self,
        kernels: list[Any],
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        mask: Mask,
        *,
        scale: float,
    ) -> Float[Array, "B T N H"]:
        """Compute on one device what `attend_blockwise` computes.

        `kernels` is this device's shard of the attribute: each kernel knows its part of the mask.
        """
        batch, queries, heads, size = q_BTNH.shape
        kv_heads = k_BSKH.shape[2]
        q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(
            batch, queries, kv_heads, -1, size
        )
        q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
        k_BKSH, v_BKSH = (part.transpose(0, 2, 1, 3) for part in (k_BSKH, v_BSKH))
        segments = pallas.SegmentIds(mask.query_segments, mask.key_segments)
        branches = [_map_batch_and_heads(kernel) for kernel in kernels]
        if len(branches) == 1:
            out_BKGTH = branches[0](q_BKGTH, k_BKSH, v_BKSH, segments)
        else:
            out_BKGTH = jax.lax.switch(
                self._window_index(mask.window), branches, q_BKGTH, k_BKSH, v_BKSH, segments
            )
        return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, size)

    def _window_index(self, window: Int[Array, ""] | None) -> Int[Array, ""]:
        no_window = jnp.iinfo(jnp.int32).max
        sizes = jnp.asarray(
            [no_window if size is None else size for size in self.windows], jnp.int32
        )
        return jnp.argmax(sizes == window)


def _map_batch_and_heads(kernel: Any) -> Any:
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    return jax.vmap(heads)
