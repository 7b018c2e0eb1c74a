"""The very step that `train` runs, lowered from shapes."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.config.schema import Config
from jaxtune.core.hardware import bytes_here
from jaxtune.core.mesh import make_mesh
from jaxtune.core.sharding import axis_size
from jaxtune.data.loader import batch_shapes, check_divides
from jaxtune.training.methods import adopt_adapter, trained_model
from jaxtune.training.optimizer import auto_rate
from jaxtune.training.setup import assembled, micro_batches_of, parameters
from jaxtune.training.state import layout
from jaxtune.training.step import train_step
from jaxtune.weights.abstract import abstract_source
from jaxtune.weights.load import load_model

_STEPS = 1000  # of the run that the schedule is made for; they change no shape
_ANSWERS = 64  # to a packed row of pairs


class Lowered:
    """A step ready to be compiled.

    Attributes:
        config, model: what it was made from, the model as shapes.
        traced: JAX's trace of it.
        mesh: the devices.
        tokens: positions of a global batch.
        trainable, frozen: numbers that train and that do not.
        frozen_bytes, state_bytes: of what does not change and of what does, on one device.
        remat: the policy, where the configuration leaves it open the one that is taken.
        passes: how often the frozen weights are read in a step.
        shares: into how many parts the rows of a batch and a sequence are cut.

    """

    def __init__(
        self, config: Config, devices: list[Any] | None, capacity: int | None = None
    ) -> None:
        config = adopt_adapter(config)
        sizes = config.mesh
        self.mesh: Mesh = make_mesh(
            sizes.data, sizes.fsdp, sizes.tensor, sizes.context, sizes.slices, devices
        )
        check_divides(config, self.mesh)
        source, train = abstract_source(config.model.source), config.train
        model = trained_model(config, source, None, self.mesh, shapes=True)
        if config.optimizer.learning_rate == "auto":
            rate = auto_rate(model.config, lora=config.adapter.method != "none")
            config = config.model_copy(
                update={"optimizer": config.optimizer.model_copy(update={"learning_rate": rate})}
            )
        teacher = config.distill.teacher
        guide = None
        if teacher is not None:
            guide = load_model(
                abstract_source(teacher), self.mesh, compute=config.model.compute_dtype, shapes=True
            )
        shape = (train.batch_size, config.data.max_length * (2 if config.on_pairs else 1))
        self.tokens = shape[0] * shape[1]
        with jax.set_mesh(self.mesh):
            parts = assembled(config, model, _STEPS, guide, self.mesh, capacity)
            state = layout(
                parts.trainable, parts.optimizer, train.seed, self.mesh, average=train.ema > 0
            )
            batch = batch_shapes(
                shape, micro_batches_of(config), self.mesh, 2 * _ANSWERS if config.on_pairs else 0
            )
            step = train_step(parts.spec, parts.optimizer, train.ema, state)
            self.traced = step.trace(state, parts.frozen, batch)
        self.config, self.model = config, model
        self.trainable, self.frozen = parameters(parts.trainable), parameters(parts.frozen.base)
        self.frozen_bytes, self.state_bytes = bytes_here(parts.frozen), bytes_here(state)
        self.remat = parts.spec.remat
        self.passes = micro_batches_of(config) * (
            3 if parts.spec.remat in ("full", "offload") else 2
        )
        self.shares = {axis: axis_size(self.mesh, axis) for axis in ("batch", "seq")}

    def compile(self, platform: str | None = None) -> Any:
        """The compiled program, for a platform or for this machine."""
        with jax.set_mesh(self.mesh):
            return self.traced.lower(lowering_platforms=(platform,) if platform else None).compile()
