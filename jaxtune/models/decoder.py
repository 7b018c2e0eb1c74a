"""The decoder: a stack of transformer blocks, written once and scanned over its layers."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxtune.core.axes import constrain
from jaxtune.models.attention import Mask, attend
from jaxtune.models.cache import Cache
from jaxtune.models.config import ModelConfig
from jaxtune.models.layers import Dropout, Embedding, Linear, RMSNorm, matmul
from jaxtune.models.remat import remat
from jaxtune.models.rope import Rope, phases, rotate


class Context(NamedTuple):
    """What a layer is told beside its input.

    Attributes:
        rope: phases of every token.
        mask: which tokens see which.
        layer: the layer's number.
        dropout: this layer's keys; None in evaluation.

    """

    rope: Rope
    mask: Mask
    layer: Any = 0
    dropout: Dropout | None = None


class Attention(nnx.Module):
    """softmax(q k^T) v with rotary q and k, several query heads per key/value head."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = partial(Linear, bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.q_proj = linear(config.hidden_size, queries, ("heads", "embed"))
        self.k_proj = linear(config.hidden_size, keys, ("kv_heads", "embed"))
        self.v_proj = linear(config.hidden_size, keys, ("kv_heads", "embed"))
        self.o_proj = linear(queries, config.hidden_size, ("embed", "heads"))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The attention output, and the cache with this pass's keys and values where one was given."""
        q, k, v = (
            project(x, context.dropout).reshape(*x.shape[:2], -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, context.rope), rotate(k, context.rope)
        if cache is not None:
            cache = cache.write(context.layer, k, v, context.mask.query_positions)
            k, v = cache.keys[context.layer].astype(q.dtype), cache.values[context.layer].astype(q.dtype)
        out = attend(constrain(q, "batch", "seq", "act_heads", None), k, v, context.mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1), context.dropout), cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"))
        self.up_proj = linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"))
        self.down_proj = linear(config.intermediate_size, config.hidden_size, ("embed", "mlp"))

    def __call__(self, x: Float[Array, "B T D"], dropout: Dropout | None) -> Float[Array, "B T D"]:
        """The feed-forward output."""
        hidden = jax.nn.silu(self.gate_proj(x, dropout)) * self.up_proj(x, dropout)
        return self.down_proj(constrain(hidden, "batch", "seq", "act_mlp"), dropout)


class DecoderLayer(nnx.Module):
    """Pre-norm transformer block: x + Attn(Norm(x)), then x + MLP(Norm(x))."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The block's output and the cache."""
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache)
        x = constrain(x + attended, "batch", "seq", "act_embed")
        x = x + self.mlp(self.post_attention_layernorm(x), context.dropout)
        return constrain(x, "batch", "seq", "act_embed"), cache


class Decoder(nnx.Module):
    """Embedding, the stacked layers, final norm: from tokens to hidden states."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = _stack(lambda rngs: DecoderLayer(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, policy: str
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the updated cache; one compiled layer, scanned."""
        graph, stacked = nnx.split(self.layers)

        def layer(carry: tuple[jax.Array, Cache | None], step: tuple) -> tuple[tuple[jax.Array, Cache | None], None]:
            weights, number = step
            drop = None if context.dropout is None else context.dropout.fold(number)
            here = context._replace(layer=number, dropout=drop)
            return nnx.merge(graph, weights)(carry[0], here, carry[1]), None

        numbers = jnp.arange(jax.tree.leaves(stacked)[0].shape[0])
        (x, cache), _ = jax.lax.scan(remat(layer, policy), (x, cache), (stacked, numbers))
        return self.norm(x), cache


class CausalLM(nnx.Module):
    """A decoder with a language-model head; the head is the embedding where they are tied.

    Args:
        config: the architecture.
        dtype: dtype of the weights, as stored.
        compute_dtype: dtype of activations and matrix products.

    """

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, compute_dtype: np.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.compute_dtype = compute_dtype
        self.model = Decoder(config, dtype=dtype, rngs=rngs)
        head = None
        if not config.tie_embeddings:
            head = Linear(config.hidden_size, config.vocab_size, ("vocab", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.lm_head = head

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        dropout: Dropout | None = None,
        remat_policy: str = "none",
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states before the head, in the compute dtype, and the cache.

        Args:
            input_ids: tokens.
            segment_ids: the example a token belongs to; tokens of different examples do not see each other. Default: one a row.
            positions: position in the segment. Default: 0, 1, 2 ... in every row.
            cache: keys and values of earlier tokens; slot s holds position s. Excludes `segment_ids`.
            dropout: keys of the adapters' dropout; None in evaluation.
            remat_policy: see `models.remat`.

        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(positions)
        keys, key_segments = positions, segment_ids
        if cache is not None:
            keys = jnp.broadcast_to(jnp.arange(cache.keys.shape[2]), (input_ids.shape[0], cache.keys.shape[2]))
            key_segments = jnp.ones_like(keys)
        rope = phases(self.config.rope, self.config.head_dim, self.config.max_positions, positions)
        context = Context(rope, Mask(positions, keys, segment_ids, key_segments), dropout=dropout)
        x = self.model.embed_tokens(input_ids, self.compute_dtype)
        return self.model(constrain(x, "batch", "seq", "act_embed"), context, cache, remat_policy)

    @property
    def head_weight(self) -> Float[Array, "vocab embed"]:
        """The matrix from hidden states to logits."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """The head applied to hidden states, float32."""
        return matmul(hidden, self.head_weight).astype(jnp.float32)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Array, "B T vocab"] | tuple[Float[Array, "B T vocab"], Cache]:
        """Logits in float32; with a cache, `(logits, cache)`. Arguments as in `hidden_states`."""
        input_ids = jnp.asarray(input_ids, jnp.int32)
        hidden, new = self.hidden_states(input_ids, segment_ids=segment_ids, positions=positions, cache=cache)
        logits = self.logits(hidden)
        return logits if new is None else (logits, new)


def _stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one whose arrays have a leading layer axis."""
    return nnx.vmap(make, in_axes=(0,), out_axes=0)(rngs.split(count))


def abstract_model(config: ModelConfig, dtype: np.dtype, compute_dtype: np.dtype) -> CausalLM:
    """The model with shapes for weights: nothing is allocated."""
    return nnx.eval_shape(lambda: CausalLM(config, dtype=dtype, compute_dtype=compute_dtype, rngs=nnx.Rngs(0)))
