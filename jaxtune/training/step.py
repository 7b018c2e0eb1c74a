"""The pure step: one optimizer update from a global batch, however it is cut."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.models.kernels.quantized import with_integer_products
from jaxtune.models.layers import Dropout
from jaxtune.objectives.objective import PLAIN, Batch, Networks, Objective, Pass

_AVERAGE_WARMUP = 10.0


class TrainState(NamedTuple):
    """All that changes in training and all that a checkpoint holds.

    Attributes:
        step: optimizer steps done, and so the index of the next batch and of its random numbers.
        trainable: the leaves that train, float32.
        opt_state: the optimizer's moments of these leaves.
        key: root of the random numbers.
        average: the moving average of the leaves that train; None where there is none.

    """

    step: jax.Array
    trainable: nnx.State
    opt_state: optax.OptState
    key: jax.Array
    average: nnx.State | None = None


class Frozen(NamedTuple):
    """All that a step needs and that does not change.

    Attributes:
        base: the frozen leaves of the model that trains.
        start: the trainable leaves as training began, for objectives with a reference; the base serves both.
        teacher: the teacher's leaves.

    """

    base: nnx.State
    start: nnx.State | None = None
    teacher: nnx.State | None = None


@dataclass(frozen=True)
class Computation:
    """What is computed, apart from numbers.

    Attributes:
        graph: the model's structure.
        objective: what is minimised.
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

    def networks(self, trainable: nnx.State, frozen: Frozen) -> Networks:
        """The models with these leaves."""
        policy = nnx.merge(self.graph, trainable, frozen.base)
        reference = None if frozen.start is None else nnx.merge(self.graph, frozen.start, frozen.base)
        teacher = None if self.teacher is None else nnx.merge(self.teacher, frozen.teacher)
        return Networks(policy, reference, teacher)


class StepMetrics(NamedTuple):
    """Scalars of one step, still on the device.

    Attributes:
        loss: the loss over the global batch; of supervised training in nats per supervised token, of preferences per pair.
        grad_norm: global norm of the mean gradient, before clipping.
        supervised: sum of the supervised tokens' weights.
        figures: what else the objective tells, such as `margin` and `accuracy`, as means.

    """

    loss: jax.Array
    grad_norm: jax.Array
    supervised: jax.Array
    figures: dict[str, jax.Array]


def init_state(trainable: nnx.State, optimizer: optax.GradientTransformation, seed: int, *, average: bool = False) -> TrainState:
    """The state before the first step."""
    with jax.numpy_dtype_promotion("standard"):
        moments = optimizer.init(trainable)
    copy = jax.tree.map(jnp.copy, trainable) if average else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, moments, jax.random.key(seed), copy)


def layout(
    trainable: nnx.State, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, *, average: bool = False
) -> TrainState:
    """The state before the first step as shapes with their shardings: a moment lies where its leaf does, the rest everywhere.

    Args:
        trainable: the leaves that train, as arrays or as shapes, with shardings.
        optimizer: see `init_state`.
        seed: likewise.
        mesh: the devices.
        average: whether there is a moving average.

    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = dict(jax.tree.leaves_with_path(trainable))
    depths = sorted({len(path) for path in places}, reverse=True)

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        of = next((places[path[-depth:]] for depth in depths if path[-depth:] in places), None)
        same = of is not None and of.shape == leaf.shape and isinstance(of.sharding, NamedSharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of.sharding if of is not None and same else everywhere)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trainable)
    state = jax.eval_shape(lambda leaves: init_state(leaves, optimizer, seed, average=average), shapes)
    return jax.tree.map_with_path(placed, state)


def train_step(
    computation: Computation, optimizer: optax.GradientTransformation, decay: float = 0.0, like: TrainState | None = None
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, StepMetrics]]:
    """The step function `(state, frozen, batch) -> (state, metrics)`, jitted, its state donated.

    The batch has shape [cuts, rows, tokens]: gradients are summed over the cuts and over all tokens, and divided once by the
    global weight, so that no way of cutting changes them.

    Args:
        computation: what is minimised.
        optimizer: the update rule.
        decay: of the moving average.
        like: the state's `layout`, which the new state keeps; by default the compiler chooses.

    """

    def loss_sum(trainable: nnx.State, frozen: Frozen, shared: Any, batch: Batch, keys: jax.Array | None):
        if computation.integer:
            frozen = frozen._replace(base=with_integer_products(frozen.base))
        how = Pass(None if keys is None else Dropout(keys), computation.noise, computation.remat)
        loss, weight, figures = computation.objective.loss(computation.networks(trainable, frozen), batch, how, shared)
        return loss, (weight, figures)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        keys = _row_keys(state, batch) if computation.random else None
        shared = _shared(computation, state.trainable, frozen, batch)
        (loss, (weight, figures)), grads = _summed(
            lambda cut: gradient(state.trainable, frozen, shared, *cut), (batch, keys), batch.input_ids.shape[0]
        )
        grads = jax.tree.map(lambda g: g / weight, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        average = None if state.average is None else _averaged(state.average, trainable, state.step, decay)
        new = TrainState(state.step + 1, trainable, opt_state, state.key, average)
        means = {name: value / weight for name, value in figures.items()}
        return new, StepMetrics(loss / weight, optax.tree.norm(grads), jnp.sum(batch.weights), means)

    kept = None if like is None else jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(kept, None))


def eval_step(
    computation: Computation,
) -> Callable[[nnx.State, Frozen, Batch], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]:
    """The function `(trainable, frozen, batch) -> (sum of losses, sum of weights, sums of further figures)`, jitted; nothing is random."""

    def step(trainable: nnx.State, frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        shared = _shared(computation, trainable, frozen, jax.tree.map(lambda x: x[None], batch))
        return computation.objective.loss(computation.networks(trainable, frozen), batch, PLAIN, shared)

    return jax.jit(step)


def _shared(computation: Computation, trainable: nnx.State, frozen: Frozen, batch: Batch) -> Any:
    """What the objective needs of the whole batch beforehand."""
    shared = computation.objective.shared
    if shared is None:
        return None
    networks = computation.networks(trainable, frozen)
    return jax.lax.stop_gradient(_summed(lambda cut: shared(networks, cut), batch, batch.input_ids.shape[0]))


def _summed(function: Callable[[Any], Any], cuts: Any, count: int) -> Any:
    """The function's sum over the cuts."""
    first = jax.tree.map(lambda x: x[0], cuts)
    if count == 1:  # without a loop the compiler need not keep a second copy of the gradients
        return function(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    total, _ = jax.lax.scan(lambda total, cut: (jax.tree.map(jnp.add, total, function(cut)), None), zeros, cuts)
    return total


def _averaged(average: nnx.State, trainable: nnx.State, step: jax.Array, decay: float) -> nnx.State:
    """The moving average; in the first steps it forgets faster, so that it does not stay where it began."""
    done = step.astype(jnp.float32) + 1
    share = 1 - jnp.minimum(decay, done / (done + _AVERAGE_WARMUP))
    return jax.tree.map(lambda old, new: old + share * (new - old), average, trainable)


def _row_keys(state: TrainState, batch: Batch) -> jax.Array:
    """A key for every row of the global batch, by step and row, the same for every cut and mesh."""
    cuts, rows = batch.input_ids.shape[:2]
    key = jax.random.fold_in(state.key, state.step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(cuts * rows)).reshape(cuts, rows)
