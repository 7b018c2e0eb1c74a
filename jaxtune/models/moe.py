"""Mixture of experts: every token goes through the few feed-forward networks that its router
chooses, and no token is dropped.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxtune.core.dtypes import precision
from jaxtune.core.sharding import RULES, partition_spec
from jaxtune.models.config import ExpertsConfig, ModelConfig
from jaxtune.models.layers import ACTIVATIONS, INIT_STD, Dropout, Router


class ExpertLinear(nnx.Module):
    """A linear map for every expert: weight [experts, out, in]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        count: int,
        *,
        dtype: np.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        init = jax.nn.initializers.normal(INIT_STD)
        self.weight = nnx.Param(
            init(rngs.params(), (count, outputs, inputs), dtype), axes=("expert", *axes)
        )


class Experts(nnx.Module):
    """The experts' weights, under Hugging Face's names with the expert's number left out."""

    def __init__(
        self, hidden: int, config: ExpertsConfig, *, dtype: np.dtype, rngs: nnx.Rngs
    ) -> None:
        linear = partial(ExpertLinear, count=config.count, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(hidden, config.size, (None, "embed"))
        self.up_proj = linear(hidden, config.size, (None, "embed"))
        self.down_proj = linear(config.size, hidden, ("embed", None))


class MoE(nnx.Module):
    """sum_e p_e down_e(act(gate_e(x)) * up_e(x)) over a token's experts e, p the router's softmax
    (Shazeer et al. 2017).

    Dropless: tokens are sorted by expert and go through one ragged product (Gale et al. 2022).
    Experts are sharded over the mesh axis of `expert`: each device computes its own experts for the
    tokens of its part of the batch, and the results are summed.
    """

    def __init__(self, config: ModelConfig, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        assert config.experts is not None
        self.config, self.activation = config.experts, config.activation
        self.gate = Router(config.hidden_size, config.experts.count, dtype=dtype, rngs=rngs)
        self.experts = Experts(config.hidden_size, config.experts, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], dropout: Dropout | None) -> Float[Array, "B T D"]:
        """Return the mixture's output."""
        weights = tuple(
            part.weight[...].astype(x.dtype)
            for part in (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        )
        scores = self.gate(x)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._mixture(x, scores, *weights, first=jnp.zeros((), jnp.int32))
        axis = RULES.expert
        sharded = self.config.count % mesh.shape[axis] == 0
        rows, expert = (
            partition_spec(mesh, ("batch", "seq", None), x.shape),
            PartitionSpec(axis if sharded else None),
        )

        def local(x: jax.Array, scores: jax.Array, *weights: jax.Array) -> jax.Array:
            if not sharded:
                return self._mixture(x, scores, *weights, first=jnp.zeros((), jnp.int32))
            first = jax.lax.axis_index(axis) * weights[0].shape[0]
            return jax.lax.psum(self._mixture(x, scores, *weights, first=first), axis)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, expert, expert, expert),
            out_specs=rows,
            check_vma=False,
        )(x, scores, *weights)

    def _mixture(
        self,
        x: Float[Array, "B T D"],
        scores: Float[Array, "B T E"],
        gate: Float[Array, "e I D"],
        up: Float[Array, "e I D"],
        down: Float[Array, "e D I"],
        *,
        first: jax.Array,
    ) -> Float[Array, "B T D"]:
        """Return what the given experts, numbered from `first`, add to the mixture."""
        count, tokens = gate.shape[0], x.reshape(-1, x.shape[-1])
        probs = jax.nn.softmax(scores.reshape(-1, self.config.count).astype(jnp.float32), axis=-1)
        probs, expert_ids = jax.lax.top_k(probs, self.config.per_token)
        if self.config.normalize:
            probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
        local = expert_ids.reshape(-1) - first
        # The experts of other devices are sorted to the end and not computed.
        local = jnp.where((local >= 0) & (local < count), local, count)
        order = jnp.argsort(local, stable=True)
        sizes = jnp.bincount(local, length=count + 1)[:count].astype(jnp.int32)
        token = order // self.config.per_token
        inputs = tokens[token]
        hidden = ACTIVATIONS[self.activation](_ragged(inputs, gate, sizes)) * _ragged(
            inputs, up, sizes
        )
        outputs = _ragged(hidden, down, sizes) * probs.reshape(-1)[order][:, None].astype(x.dtype)
        return jnp.zeros_like(tokens).at[token].add(outputs).reshape(x.shape)


def _ragged(
    x: Float[Array, "rows in"], weight: Float[Array, "e out in"], sizes: jax.Array
) -> Float[Array, "rows out"]:
    """Multiply each run of `sizes` rows with its expert's matrix; rows after the last run give
    zeros.
    """
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return jax.lax.ragged_dot_general(x, weight, sizes, numbers, precision=precision(x.dtype))
