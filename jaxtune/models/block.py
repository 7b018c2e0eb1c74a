"""The transformer block: attention and a feed-forward network, with their norms."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxtune.core.sharding import constrain
from jaxtune.models.config import ModelConfig
from jaxtune.models.kernels.attention import attend
from jaxtune.models.kernels.mask import Mask
from jaxtune.models.kv_cache import KVCache
from jaxtune.models.layers import ACTIVATIONS, Dropout, Linear, RMSNorm
from jaxtune.models.moe import MoE
from jaxtune.models.rope import Rope, apply_rope


class LayerStep(NamedTuple):
    """A layer's number and, by index, what differs from layer to layer. Stacked over layers it is
    the input of the scan.
    """

    number: Any
    rope: Any
    window: Any


class Context(NamedTuple):
    """What a layer needs beside its input.

    Attributes:
        rope: cosines and sines of every token, stacked over the model's rotary embeddings.
        mask: which tokens see which.
        layer: the layer's number.
        dropout: this layer's keys; None in evaluation.

    """

    rope: Rope
    mask: Mask
    layer: Any = 0
    dropout: Dropout | None = None

    def for_layer(self, step: LayerStep) -> "Context":
        """Return the context of one layer."""
        mask = self.mask if step.window is None else self.mask._replace(window=step.window)
        dropout = None if self.dropout is None else self.dropout.fold(step.number)
        return Context(Rope(*(part[step.rope] for part in self.rope)), mask, step.number, dropout)


class Attention(nnx.Module):
    """softmax(q k^T) v with rotary q and k, several query heads per key/value head."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        queries, keys = config.num_heads * size, config.num_kv_heads * size
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        if config.fused:
            self.qkv_proj = linear(
                hidden, queries + 2 * keys, ("heads", "embed"), bias=config.qkv_bias
            )
        else:
            self.q_proj = linear(hidden, queries, ("heads", "embed"), bias=config.qkv_bias)
            self.k_proj = linear(hidden, keys, ("kv_heads", "embed"), bias=config.qkv_bias)
            self.v_proj = linear(hidden, keys, ("kv_heads", "embed"), bias=config.qkv_bias)
        self.o_proj = linear(queries, hidden, ("embed", "heads"), bias=config.o_bias)
        if config.qk_norm:
            q_size, k_size = (size, size) if config.qk_norm == "head" else (queries, keys)
            self.q_norm = RMSNorm(q_size, config.norm, dtype=dtype)
            self.k_norm = RMSNorm(k_size, config.norm, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Return the output, and the cache with this pass's keys and values if one was given."""
        q, k, v = self._project(x, context.dropout)
        q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        config = self.config
        windows = config.windows if cache is None else None
        if cache is not None:
            cache = cache.write(context.layer, k, v, context.mask.query_positions)
            k, v = (
                cache.keys[context.layer].astype(q.dtype),
                cache.values[context.layer].astype(q.dtype),
            )
        q = constrain(q, "batch", "seq", "act_heads", None)
        out = attend(
            q,
            k,
            v,
            context.mask,
            scale=config.attention_scale,
            cap=config.attention_softcap,
            windows=windows,
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1), context.dropout), cache

    def _project(
        self, x: jax.Array, dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values [B, T, heads, head_dim] before rotation, normalized
        where the family normalizes them.
        """
        config = self.config
        if config.fused:
            queries, keys = (
                config.num_heads * config.head_dim,
                config.num_kv_heads * config.head_dim,
            )
            q, k, v = jnp.split(self.qkv_proj(x, dropout), (queries, queries + keys), axis=-1)
        else:
            q, k, v = self.q_proj(x, dropout), self.k_proj(x, dropout), self.v_proj(x, dropout)
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (gated linear units, Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        self.fused, self.activation = config.fused, config.activation
        linear = partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        if config.fused:
            self.gate_up_proj = linear(
                config.hidden_size, 2 * config.intermediate_size, ("mlp", "embed")
            )
        else:
            self.gate_proj = linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"))
            self.up_proj = linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"))
        self.down_proj = linear(config.intermediate_size, config.hidden_size, ("embed", "mlp"))

    def __call__(self, x: Float[Array, "B T D"], dropout: Dropout | None) -> Float[Array, "B T D"]:
        """Return the feed-forward output."""
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x, dropout), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x, dropout), self.up_proj(x, dropout)
        hidden = constrain(ACTIVATIONS[self.activation](gate) * up, "batch", "seq", "act_mlp")
        return self.down_proj(hidden, dropout)


# Where a block normalizes: the norms at the input and the output of the attention, then of the MLP,
# by their names in Hugging Face.
_NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class DecoderLayer(nnx.Module):
    """Transformer block: x + Attn(x), then x + MLP(x), each normalized at its input, its output
    or both.
    """

    def __init__(
        self, config: ModelConfig, sparse: bool, *, dtype: np.dtype, rngs: nnx.Rngs
    ) -> None:
        self.norms, self.residual_scale = _NORMS[config.norms], config.residual_scale
        for name in self.norms:
            if name:
                setattr(self, name, RMSNorm(config.hidden_size, config.norm, dtype=dtype))
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = (MoE if sparse else MLP)(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Return the block's output and the cache."""
        before, after, before_mlp, after_mlp = self.norms
        attended, cache = self.self_attn(self._input(before, x), context, cache)
        x = self._add(x, self._norm(after, attended))
        hidden = self.mlp(self._input(before_mlp, x), context.dropout)
        return self._add(x, self._norm(after_mlp, hidden)), cache

    def _input(self, name: str | None, x: jax.Array) -> jax.Array:
        return constrain(self._norm(name, x), "batch", "seq", "act_embed")

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        return getattr(self, name)(x) if name else x

    def _add(self, x: jax.Array, update: jax.Array) -> jax.Array:
        if self.residual_scale != 1.0:
            update = update * jnp.asarray(self.residual_scale, update.dtype)
        return constrain(x + update, "batch", "kept_seq", "act_embed")
