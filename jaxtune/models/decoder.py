"""The decoder: a stack of transformer blocks, written once and scanned over its layers."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxtune.core.hardware import platform
from jaxtune.core.sharding import constrain
from jaxtune.models.config import ModelConfig
from jaxtune.models.kernels.attention import attend
from jaxtune.models.kernels.mask import Mask
from jaxtune.models.kv_cache import KVCache
from jaxtune.models.layers import ACTIVATIONS, Dropout, Embedding, Linear, RMSNorm, matmul, softcap
from jaxtune.models.moe import MoE
from jaxtune.models.remat import LAYER, as_bits, as_float, named, remat
from jaxtune.models.rope import Rope, apply_rope, no_rotation, rope_cos_sin, segment_lengths


class Context(NamedTuple):
    """What a layer is told beside its input.

    Attributes:
        rope: phases of every token, stacked over the model's rotary embeddings.
        mask: which tokens see which.
        layer: the layer's number.
        dropout: this layer's keys; None in evaluation.

    """

    rope: Rope
    mask: Mask
    layer: Any = 0
    dropout: Dropout | None = None

    def at(self, step: "LayerStep") -> "Context":
        """What one layer is told."""
        mask = self.mask if step.window is None else self.mask._replace(window=step.window)
        dropout = None if self.dropout is None else self.dropout.fold(step.number)
        return Context(Rope(*(part[step.rope] for part in self.rope)), mask, step.number, dropout)


class LayerStep(NamedTuple):
    """A layer's number and, by number, what differs from layer to layer; stacked, the scan's
    input.
    """

    number: Any
    rope: Any
    window: Any


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
            self.q_norm = RMSNorm(
                size if config.qk_norm == "head" else queries, config.norm, dtype=dtype
            )
            self.k_norm = RMSNorm(
                size if config.qk_norm == "head" else keys, config.norm, dtype=dtype
            )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The attention output, and the cache with this pass's keys and values where one was
        given.
        """
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
            q, k, v, context.mask, config.attention_scale, config.attention_softcap, windows
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1), context.dropout), cache

    def _project(
        self, x: jax.Array, dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, heads, head_dim], normalized where the family does,
        not rotated.
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
        """The feed-forward output."""
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
        """The block's output and the cache."""
        before, after, before_mlp, after_mlp = self.norms
        attended, cache = self.self_attn(self._input(before, x), context, cache)
        x = self._add(x, self._norm(after, attended))
        return self._add(
            x, self._norm(after_mlp, self.mlp(self._input(before_mlp, x), context.dropout))
        ), cache

    def _input(self, name: str | None, x: jax.Array) -> jax.Array:
        return constrain(self._norm(name, x), "batch", "seq", "act_embed")

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        return getattr(self, name)(x) if name else x

    def _add(self, x: jax.Array, update: jax.Array) -> jax.Array:
        if self.residual_scale != 1.0:
            update = update * jnp.asarray(self.residual_scale, update.dtype)
        return constrain(x + update, "batch", "kept_seq", "act_embed")


class Decoder(nnx.Module):
    """Embedding, the stacked layers, final norm: from tokens to hidden states."""

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size + config.vocab_padding, config.hidden_size, dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(
            _stack(
                partial(DecoderLayer, config, config.layers[part[0]].sparse, dtype=dtype),
                len(part),
                rngs,
            )
            for part in config.segments
        )
        self.norm = RMSNorm(config.hidden_size, config.norm, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None, policy: str
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the final norm, and the updated cache; each segment is one
        compiled layer, scanned.
        """
        for part, segment in zip(self.config.segments, self.layers, strict=True):
            graph, stacked = nnx.split(segment)
            stacked = _stored(stacked)

            def layer(carry: tuple, step: tuple, graph: nnx.GraphDef = graph) -> tuple[tuple, None]:
                weights, numbers = step
                x, cache = named(carry[0], LAYER), carry[1]
                return nnx.merge(graph, _restored(weights))(x, context.at(numbers), cache), None

            (x, cache), _ = jax.lax.scan(
                remat(layer, policy), (x, cache), (stacked, _steps(self.config, part))
            )
        return constrain(self.norm(x), "batch", "seq", "act_embed"), cache


def _stored(stacked: nnx.State) -> nnx.State:
    """The stacks as they enter the scan: on CPU bfloat16 as bits, since XLA would take all
    layers to float32 to cut one out.
    """
    if platform() != "cpu":
        return stacked
    return jax.tree.map(
        lambda leaf: _frozen_bits(leaf) if leaf.dtype == jnp.bfloat16 else leaf, stacked
    )


def _restored(weights: nnx.State) -> nnx.State:
    """The inverse of `_stored`; there are no other weights of sixteen-bit integers."""
    return jax.tree.map(lambda leaf: as_float(leaf) if leaf.dtype == jnp.uint16 else leaf, weights)


def _frozen_bits_fwd(x: Any) -> tuple[jax.Array, None]:
    if x.perturbed:
        raise TypeError(
            "Gradients of bfloat16 weights are not computed on CPU. Load what shall train in "
            "float32."
        )
    return as_bits(x.value), None


_frozen_bits = jax.custom_vjp(as_bits)
_frozen_bits.defvjp(_frozen_bits_fwd, lambda _, dy: (None,), symbolic_zeros=True)


def _steps(config: ModelConfig, part: range) -> LayerStep:
    """The layers of a segment for the scan."""
    layers = [config.layers[number] for number in part]
    ropes = [len(config.ropes) if layer.rope is None else layer.rope for layer in layers]
    windows = [_EVERYTHING if layer.window is None else layer.window for layer in layers]
    everything = all(layer.window is None for layer in config.layers)
    return LayerStep(
        np.asarray(part, np.int32),
        np.asarray(ropes, np.int32),
        None if everything else np.asarray(windows, np.int32),
    )


_EVERYTHING = np.iinfo(np.int32).max


class CausalLM(nnx.Module):
    """A decoder with a language-model head; the head is the embedding where they are tied.

    Args:
        config: the architecture.
        dtype: dtype of the weights, as stored.
        compute_dtype: dtype of activations and matrix products.

    """

    def __init__(
        self, config: ModelConfig, *, dtype: np.dtype, compute_dtype: np.dtype, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.adapter: Any = None  # what `adapters.inject` put on the model
        self.compute_dtype = compute_dtype
        self.model = Decoder(config, dtype=dtype, rngs=rngs)
        head = None
        if not config.tie_embeddings:
            rows = config.vocab_size + config.vocab_padding
            head = Linear(
                config.hidden_size, rows, ("vocab", "embed"), bias=False, dtype=dtype, rngs=rngs
            )
        self.lm_head = nnx.data(head)

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        dropout: Dropout | None = None,
        noise: float = 0.0,
        remat_policy: str = "none",
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states before the head, in the compute dtype, and the cache.

        Args:
            input_ids: tokens.
            segment_ids: the example a token belongs to; tokens of different examples do not see
                each other. Default: one a row.
            positions: position in the segment, rising by one from token to token; with a cache,
                negative for padding. Default: 0, 1, 2 ... in every row.
            cache: keys and values of earlier tokens; slot s holds position s. Excludes
                `segment_ids`.
            dropout: keys of the random numbers in training; None in evaluation.
            noise: alpha of NEFTune (Jain et al. 2023): uniform noise within alpha / sqrt(tokens of
                the example x embed) on the embeddings, in training.
            remat_policy: see `models.remat`.

        """
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape
            )
        if segment_ids is None:
            segment_ids = jnp.ones_like(positions)
        x = self.model.embed_tokens(input_ids, self.compute_dtype)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if noise and dropout is not None:
            tokens = segment_lengths(positions, segment_ids).astype(jnp.float32)
            bound = noise / jnp.sqrt(tokens * x.shape[-1])
            x = x + (dropout.uniform(x.shape[1:], "neftune") * bound[..., None]).astype(x.dtype)
        context = self._context(positions, segment_ids, cache)._replace(dropout=dropout)
        hidden, cache = self.model(
            constrain(x, "batch", "kept_seq", "act_embed"), context, cache, remat_policy
        )
        return hidden * jnp.asarray(
            self.config.logit_scale, hidden.dtype
        ) if self.config.logit_scale != 1.0 else hidden, cache

    def _context(
        self, positions: jax.Array, segment_ids: jax.Array, cache: KVCache | None
    ) -> Context:
        by_length = any(kind.by_length for kind in self.config.ropes)
        lengths = segment_lengths(positions, segment_ids) if by_length else positions
        rope = self._phases(positions, lengths)
        if cache is None:
            return Context(rope, Mask(positions, positions, segment_ids, segment_ids))
        slots = jnp.broadcast_to(
            jnp.arange(cache.keys.shape[2], dtype=jnp.int32),
            (positions.shape[0], cache.keys.shape[2]),
        )
        return Context(rope, Mask(positions, slots, segment_ids, jnp.ones_like(slots)))

    def _phases(self, positions: jax.Array, lengths: jax.Array) -> Rope:
        """The phases of every rotary embedding that layers choose from, stacked; where some
        layer has none, no rotation is the last.
        """
        config = self.config
        found = [
            rope_cos_sin(kind, config.head_dim, config.max_positions, positions, lengths)
            for kind in config.ropes
        ]
        if any(layer.rope is None for layer in config.layers):
            found.append(no_rotation(found[0]))
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    def head(
        self, hidden: Float[Array, "*batch embed"], dropout: Dropout | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`(h, W)`: the logits are h W^T, before a soft-cap; W is [vocab, embed], or wider by
        the rank of the head's adapter.
        """
        h, weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).as_head(
            hidden, dropout
        )
        return h, weight[: self.config.vocab_size] if self.config.vocab_padding else weight

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """The head applied to hidden states, float32."""
        return softcap(matmul(*self.head(hidden)).astype(jnp.float32), self.config.logit_softcap)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "B T vocab"] | tuple[Float[Array, "B T vocab"], KVCache]:
        """Logits in float32; with a cache, `(logits, cache)`. Arguments as in `hidden_states`."""
        input_ids = jnp.asarray(input_ids, jnp.int32)
        hidden, new = self.hidden_states(
            input_ids, segment_ids=segment_ids, positions=positions, cache=cache
        )
        logits = self.logits(hidden)
        return logits if new is None else (logits, new)


def _stack(make: Callable[..., nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one whose arrays have a leading layer axis."""
    return nnx.vmap(lambda rngs: make(rngs=rngs), in_axes=(0,), out_axes=0)(rngs.split(count))


def abstract_model(config: ModelConfig, dtype: np.dtype, compute_dtype: np.dtype) -> CausalLM:
    """The model with shapes for weights: nothing is allocated."""
    return nnx.eval_shape(
        lambda: CausalLM(config, dtype=dtype, compute_dtype=compute_dtype, rngs=nnx.Rngs(0))
    )
