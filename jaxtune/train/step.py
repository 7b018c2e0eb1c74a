"""The pure step: one optimizer update from a global batch, however it is cut."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtune.models.layers import Dropout
from jaxtune.objectives.sft import Batch

Objective = Callable[[Any, Batch, Dropout | None, str], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """All that changes in training and all that a checkpoint holds.

    Attributes:
        step: optimizer steps done, and so the index of the next batch and of its random numbers.
        trainable: the leaves that train, float32.
        opt_state: the optimizer's moments of these leaves.
        key: root of the dropout's random numbers.

    """

    step: jax.Array
    trainable: nnx.State
    opt_state: optax.OptState
    key: jax.Array


class StepMetrics(NamedTuple):
    """Scalars of one step, still on the device.

    Attributes:
        loss: nats per supervised token, over the global batch.
        grad_norm: global norm of the mean gradient, before clipping.
        supervised: sum of the supervised tokens' weights.

    """

    loss: jax.Array
    grad_norm: jax.Array
    supervised: jax.Array


def init_state(trainable: nnx.State, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), jax.random.key(seed))


def train_step(
    graph: nnx.GraphDef, objective: Objective, optimizer: optax.GradientTransformation, remat: str, dropout: bool
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, StepMetrics]]:
    """The step function `(state, frozen, batch) -> (state, metrics)`, jitted, its state donated.

    The batch has shape [cuts, rows, tokens]: gradients are summed over the cuts and over all tokens, and divided once by the
    global weight, so that no way of cutting changes them.

    Args:
        graph: the model's structure.
        objective: sums of losses and weights.
        optimizer: the update rule.
        remat: the remat policy's name.
        dropout: whether the model has dropout, and so needs random numbers.

    """

    def loss_sum(trainable: nnx.State, frozen: nnx.State, batch: Batch, keys: jax.Array | None):
        model = nnx.merge(graph, trainable, frozen)
        loss, weight, _ = objective(model, batch, None if keys is None else Dropout(keys), remat)
        return loss, weight

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, StepMetrics]:
        keys = _row_keys(state, batch) if dropout else None

        def add(total, cut):
            (loss, weight), grads = gradient(state.trainable, frozen, *cut)
            return jax.tree.map(jnp.add, total, (loss, weight, grads)), None

        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        cuts = (batch, keys)
        if batch.input_ids.shape[0] == 1:  # without a loop the compiler need not keep a second copy of the gradients
            total, _ = add(zeros, jax.tree.map(lambda x: x[0], cuts))
        else:
            total, _ = jax.lax.scan(add, zeros, cuts)
        loss, weight, grads = total
        grads = jax.tree.map(lambda g: g / weight, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        new = TrainState(state.step + 1, trainable, opt_state, state.key)
        return new, StepMetrics(loss / weight, optax.tree.norm(grads), weight)

    return jax.jit(step, donate_argnums=0)


def eval_step(graph: nnx.GraphDef, objective: Objective) -> Callable[[nnx.State, nnx.State, Batch], tuple[jax.Array, jax.Array]]:
    """The function `(trainable, frozen, batch) -> (sum of losses, sum of weights)`, jitted; never any dropout."""

    def step(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss, weight, _ = objective(nnx.merge(graph, trainable, frozen), batch, None, "none")
        return loss, weight

    return jax.jit(step)


def _row_keys(state: TrainState, batch: Batch) -> jax.Array:
    """A key for every row of the global batch, by step and row, the same for every cut and mesh."""
    cuts, rows = batch.input_ids.shape[:2]
    key = jax.random.fold_in(state.key, state.step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(cuts * rows)).reshape(cuts, rows)
