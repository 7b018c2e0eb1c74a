"""The decoder: a stack of transformer blocks, written once and scanned over its layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxtune.core.hardware import platform
from jaxtune.core.sharding import constrain
from jaxtune.models.block import Context, DecoderLayer, LayerStep
from jaxtune.models.config import ModelConfig
from jaxtune.models.kernels.mask import Mask
from jaxtune.models.kv_cache import KVCache
from jaxtune.models.layers import Dropout, Embedding, Linear, RMSNorm, matmul, softcap
from jaxtune.models.remat import LAYER, as_bits, as_float, named, remat
from jaxtune.models.rope import Rope, no_rotation, rope_cos_sin, segment_lengths

_NO_WINDOW = np.iinfo(np.int32).max


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
        """Return the hidden states after the final norm, and the updated cache.

        Each segment is one compiled layer, scanned.
        """
        for part, segment in zip(self.config.segments, self.layers, strict=True):
            graph, stacked = nnx.split(segment)
            stacked = _to_scan_storage(stacked)

            def layer(carry: tuple, step: tuple, graph: nnx.GraphDef = graph) -> tuple[tuple, None]:
                weights, numbers = step
                x, cache = named(carry[0], LAYER), carry[1]
                module = nnx.merge(graph, _from_scan_storage(weights))
                return module(x, context.for_layer(numbers), cache), None

            (x, cache), _ = jax.lax.scan(
                remat(layer, policy), (x, cache), (stacked, _layer_steps(self.config, part))
            )
        return constrain(self.norm(x), "batch", "seq", "act_embed"), cache


def _to_scan_storage(stacked: nnx.State) -> nnx.State:
    """Return the stacks as they enter the scan: on CPU bfloat16 as bits, since XLA would convert
    all layers to float32 to slice one of them.
    """
    if platform() != "cpu":
        return stacked
    return jax.tree.map(
        lambda leaf: _frozen_bits(leaf) if leaf.dtype == jnp.bfloat16 else leaf, stacked
    )


def _from_scan_storage(weights: nnx.State) -> nnx.State:
    """Undo `_to_scan_storage`; no other weights are sixteen-bit integers."""
    return jax.tree.map(lambda leaf: as_float(leaf) if leaf.dtype == jnp.uint16 else leaf, weights)


def _frozen_bits_fwd(x: Any) -> tuple[jax.Array, None]:
    if x.perturbed:
        raise TypeError(
            "Gradients of bfloat16 weights are not computed on CPU. Load the weights that train "
            "in float32."
        )
    return as_bits(x.value), None


_frozen_bits = jax.custom_vjp(as_bits)
_frozen_bits.defvjp(_frozen_bits_fwd, lambda _, dy: (None,), symbolic_zeros=True)


def _layer_steps(config: ModelConfig, part: range) -> LayerStep:
    """Return the layers of a segment as the input of the scan."""
    layers = [config.layers[number] for number in part]
    ropes = [len(config.ropes) if layer.rope is None else layer.rope for layer in layers]
    windows = [_NO_WINDOW if layer.window is None else layer.window for layer in layers]
    no_windows = all(layer.window is None for layer in config.layers)
    return LayerStep(
        np.asarray(part, np.int32),
        np.asarray(ropes, np.int32),
        None if no_windows else np.asarray(windows, np.int32),
    )


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
        self.adapter: Any = None  # set by `adapters.inject`
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
        """Return the hidden states before the head, in the compute dtype, and the cache.

        Args:
            input_ids: tokens.
            segment_ids: the example a token belongs to; tokens of different examples do not see
                each other. Default: one example per row.
            positions: position in the segment, rising by one from token to token; with a cache,
                negative for padding. Default: 0, 1, 2 ... in every row.
            cache: keys and values of earlier tokens; slot s holds position s. It cannot be combined
                with `segment_ids`.
            dropout: keys of the random numbers in training; None in evaluation.
            noise: alpha of NEFTune (Jain et al. 2023): in training, uniform noise on the embeddings
                within alpha / sqrt(tokens of the example x embed).
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
        if self.config.logit_scale != 1.0:
            hidden = hidden * jnp.asarray(self.config.logit_scale, hidden.dtype)
        return hidden, cache

    def _context(
        self, positions: jax.Array, segment_ids: jax.Array, cache: KVCache | None
    ) -> Context:
        by_length = any(kind.by_length for kind in self.config.ropes)
        lengths = segment_lengths(positions, segment_ids) if by_length else positions
        rope = self._ropes(positions, lengths)
        if cache is None:
            return Context(rope, Mask(positions, positions, segment_ids, segment_ids))
        slots = jnp.broadcast_to(
            jnp.arange(cache.keys.shape[2], dtype=jnp.int32),
            (positions.shape[0], cache.keys.shape[2]),
        )
        return Context(rope, Mask(positions, slots, segment_ids, jnp.ones_like(slots)))

    def _ropes(self, positions: jax.Array, lengths: jax.Array) -> Rope:
        """Return the cosines and sines of every rotary embedding that layers choose from, stacked;
        the last of them rotates nothing, if some layer has no rotary embedding.
        """
        config = self.config
        ropes = [
            rope_cos_sin(kind, config.head_dim, config.max_positions, positions, lengths)
            for kind in config.ropes
        ]
        if any(layer.rope is None for layer in config.layers):
            ropes.append(no_rotation(ropes[0]))
        return jax.tree.map(lambda *parts: jnp.stack(parts), *ropes)

    def head(
        self, hidden: Float[Array, "*batch embed"], dropout: Dropout | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return `(h, W)`: the logits are h W^T, before a soft-cap; W is [vocab, embed], or wider
        by the rank of the head's adapter.
        """
        layer = self.model.embed_tokens if self.lm_head is None else self.lm_head
        h, weight = layer.as_head(hidden, dropout)
        return h, weight[: self.config.vocab_size] if self.config.vocab_padding else weight

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Apply the head to hidden states, in float32."""
        return softcap(matmul(*self.head(hidden)).astype(jnp.float32), self.config.logit_softcap)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "B T vocab"] | tuple[Float[Array, "B T vocab"], KVCache]:
        """Return the logits in float32, or `(logits, cache)` if a cache is given.

        The arguments are those of `hidden_states`.
        """
        input_ids = jnp.asarray(input_ids, jnp.int32)
        hidden, cache = self.hidden_states(
            input_ids, segment_ids=segment_ids, positions=positions, cache=cache
        )
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)


def _stack(make: Callable[..., nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make `count` modules as one whose arrays have a leading layer axis."""
    return nnx.vmap(lambda rngs: make(rngs=rngs), in_axes=(0,), out_axes=0)(rngs.split(count))


def abstract_model(config: ModelConfig, dtype: np.dtype, compute_dtype: np.dtype) -> CausalLM:
    """Return the model with shapes in place of weights; nothing is allocated."""
    return nnx.eval_shape(
        lambda: CausalLM(config, dtype=dtype, compute_dtype=compute_dtype, rngs=nnx.Rngs(0))
    )
