"""What changes in training, what does not, and how both lie on the devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec


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
        reference_params: the trainable leaves as training began, for objectives with a reference;
            the base serves both.
        teacher: the teacher's leaves.

    """

    base: nnx.State
    reference_params: nnx.State | None = None
    teacher: nnx.State | None = None


def init_state(
    trainable: nnx.State,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    average: bool = False,
) -> TrainState:
    """Return the state before the first step."""
    with jax.numpy_dtype_promotion("standard"):
        moments = optimizer.init(trainable)
    copy = jax.tree.map(jnp.copy, trainable) if average else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, moments, jax.random.key(seed), copy)


def state_layout(
    trainable: nnx.State,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    *,
    average: bool = False,
) -> TrainState:
    """Return the state as shapes with their shardings: a moment lies where its leaf does, the rest
    everywhere.

    Args:
        trainable: the leaves that train, as arrays or as shapes, with shardings.
        optimizer: the update rule.
        seed: the seed of the random key.
        mesh: the devices.
        average: whether there is a moving average.

    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = dict(jax.tree.leaves_with_path(trainable))
    depths = sorted({len(path) for path in places}, reverse=True)

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        of = next((places[path[-depth:]] for depth in depths if path[-depth:] in places), None)
        same = of is not None and of.shape == leaf.shape and isinstance(of.sharding, NamedSharding)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=of.sharding if of is not None and same else everywhere
        )

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trainable)
    state = jax.eval_shape(
        lambda leaves: init_state(leaves, optimizer, seed, average=average), shapes
    )
    return jax.tree.map_with_path(placed, state)
