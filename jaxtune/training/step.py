"""The pure step: one optimizer update from a global batch, in any number of micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtune.data.batch import Batch
from jaxtune.models.kernels.quantized import with_integer_products
from jaxtune.models.layers import Dropout
from jaxtune.objectives.objective import DETERMINISTIC, ForwardOptions, Models, Objective
from jaxtune.training.state import Frozen, TrainState

_AVERAGE_WARMUP = 10.0


@dataclass(frozen=True)
class StepSpec:
    """What is computed, apart from numbers.

    Attributes:
        graph: the model's structure.
        objective: what is minimized.
        remat: the remat policy's name.
        integer: whether training multiplies a base of eight bits as integers.
        random: whether training needs random numbers.
        noise: NEFTune's alpha.
        teacher: the teacher's structure.

    """

    graph: nnx.GraphDef
    objective: Objective
    remat: str = "none"
    integer: bool = False
    random: bool = False
    noise: float = 0.0
    teacher: nnx.GraphDef | None = None

    def models(self, trainable: nnx.State, frozen: Frozen) -> Models:
        """Return the models with these leaves."""
        policy = nnx.merge(self.graph, trainable, frozen.base)
        reference = (
            None
            if frozen.reference_params is None
            else nnx.merge(self.graph, frozen.reference_params, frozen.base)
        )
        teacher = None if self.teacher is None else nnx.merge(self.teacher, frozen.teacher)
        return Models(policy, reference, teacher)


class StepMetrics(NamedTuple):
    """Scalars of one step, still on the device.

    Attributes:
        loss: the loss over the global batch; of supervised training in nats per supervised token,
            of preferences per pair.
        grad_norm: global norm of the mean gradient, before clipping.
        supervised: sum of the supervised tokens' weights.
        extra: the objective's further metrics, such as `margin` and `accuracy`, as means.

    """

    loss: jax.Array
    grad_norm: jax.Array
    supervised: jax.Array
    extra: dict[str, jax.Array]


def train_step(
    spec: StepSpec,
    optimizer: optax.GradientTransformation,
    decay: float = 0.0,
    like: TrainState | None = None,
) -> jax.stages.Wrapped:
    """Return the function `(state, frozen, batch) -> (state, metrics)`, jitted, its state donated.

    The batch has shape [micro_batches, rows, tokens]: gradients are summed over the micro-batches
    and over all tokens, and divided once by the global weight, so that they do not depend on the
    number of micro-batches.

    Args:
        spec: the computation.
        optimizer: the update rule.
        decay: the moving average's decay.
        like: see `state.state_layout`: the new state keeps it; by default the compiler chooses.

    """

    def loss_sum(
        trainable: nnx.State, frozen: Frozen, shared: Any, batch: Batch, keys: jax.Array | None
    ):
        if spec.integer:
            frozen = frozen._replace(base=with_integer_products(frozen.base))
        options = ForwardOptions(None if keys is None else Dropout(keys), spec.noise, spec.remat)
        loss, weight, extra = spec.objective.loss(
            spec.models(trainable, frozen), batch, options, shared
        )
        return loss, (weight, extra)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        keys = _row_keys(state, batch) if spec.random else None
        shared = _shared(spec, state.trainable, frozen, batch)
        (loss, (weight, extra)), grads = _summed(
            lambda micro_batch: gradient(state.trainable, frozen, shared, *micro_batch),
            (batch, keys),
            batch.input_ids.shape[0],
        )
        grads = jax.tree.map(lambda g: g / weight, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        average = (
            None
            if state.average is None
            else _averaged(state.average, trainable, state.step, decay)
        )
        new = TrainState(state.step + 1, trainable, opt_state, state.key, average)
        means = {name: value / weight for name, value in extra.items()}
        return new, StepMetrics(
            loss / weight, optax.tree.norm(grads), jnp.sum(batch.weights), means
        )

    kept = None if like is None else jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(kept, None))


def eval_step(
    spec: StepSpec,
) -> Callable[[nnx.State, Frozen, Batch], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]:
    """Return the function `(trainable, frozen, batch) -> (sum of losses, sum of weights, sums of
    further metrics)`, jitted; nothing is random.
    """

    def step(
        trainable: nnx.State, frozen: Frozen, batch: Batch
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        shared = _shared(spec, trainable, frozen, jax.tree.map(lambda x: x[None], batch))
        return spec.objective.loss(spec.models(trainable, frozen), batch, DETERMINISTIC, shared)

    return jax.jit(step)


def _shared(spec: StepSpec, trainable: nnx.State, frozen: Frozen, batch: Batch) -> Any:
    """Compute what the objective needs of the whole batch beforehand."""
    shared = spec.objective.shared
    if shared is None:
        return None
    models = spec.models(trainable, frozen)
    return jax.lax.stop_gradient(
        _summed(lambda micro_batch: shared(models, micro_batch), batch, batch.input_ids.shape[0])
    )


def _summed(function: Callable[[Any], Any], micro_batches: Any, count: int) -> Any:
    """Sum the function over the micro-batches."""
    first = jax.tree.map(lambda x: x[0], micro_batches)
    if count == 1:  # without a loop the compiler need not keep a second copy of the gradients
        return function(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    total, _ = jax.lax.scan(
        lambda total, micro_batch: (jax.tree.map(jnp.add, total, function(micro_batch)), None),
        zeros,
        micro_batches,
    )
    return total


def _averaged(average: nnx.State, trainable: nnx.State, step: jax.Array, decay: float) -> nnx.State:
    """Update the moving average; in the first steps it forgets faster, so that it does not stay
    where it began.
    """
    done = step.astype(jnp.float32) + 1
    share = 1 - jnp.minimum(decay, done / (done + _AVERAGE_WARMUP))
    return jax.tree.map(lambda old, new: old + share * (new - old), average, trainable)


def _row_keys(state: TrainState, batch: Batch) -> jax.Array:
    """Return a key for every row of the global batch, by step and row, the same for every number of
    micro-batches and every mesh.
    """
    micro_batches, rows = batch.input_ids.shape[:2]
    key = jax.random.fold_in(state.key, state.step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        key, jnp.arange(micro_batches * rows)
    ).reshape(micro_batches, rows)
