"""The step that `train` runs, lowered from shapes."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.config.schema import Config
from jaxtune.core.hardware import bytes_per_device
from jaxtune.core.mesh import make_mesh
from jaxtune.core.sharding import axis_size
from jaxtune.data.loader import batch_shapes, check_divides
from jaxtune.training.methods import adopt_adapter, trained_model
from jaxtune.training.optimizer import resolve_learning_rate
from jaxtune.training.setup import assemble_step, count_parameters, micro_batches_of
from jaxtune.training.state import state_layout
from jaxtune.training.step import train_step
from jaxtune.weights.abstract import abstract_source
from jaxtune.weights.load import load_model

_STEPS = 1000  # of the schedule; the number of steps changes no shape
_ANSWERS = 64  # per packed row of pairs


class Lowered:
    """A step that is ready to be compiled.

    Attributes:
        config, model: the configuration, and the model as shapes.
        traced: JAX's trace of the step.
        mesh: the devices.
        tokens: positions of a global batch.
        trainable, frozen: the numbers of parameters.
        frozen_bytes, state_bytes: bytes on one device of the frozen weights and of the state.
        remat: the remat policy, as given or as chosen by train.remat=auto.
        passes: how often a step reads the frozen weights.
        shards: into how many parts the rows of a batch and a sequence are sharded.

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
        config = resolve_learning_rate(config, model.config)
        teacher = config.distill.teacher
        teacher_model = None
        if teacher is not None:
            teacher_model = load_model(
                abstract_source(teacher), self.mesh, compute=config.model.compute_dtype, shapes=True
            )
        shape = (train.batch_size, config.row_length)
        segments = 2 * _ANSWERS if config.on_pairs else 0
        self.tokens = shape[0] * shape[1]
        with jax.set_mesh(self.mesh):
            parts = assemble_step(config, model, _STEPS, teacher_model, self.mesh, capacity)
            state = state_layout(
                parts.trainable, parts.optimizer, train.seed, self.mesh, average=train.ema > 0
            )
            batch = batch_shapes(shape, micro_batches_of(config), self.mesh, segments)
            step = train_step(parts.spec, parts.optimizer, train.ema, state)
            self.traced = step.trace(state, parts.frozen, batch)
        self.config, self.model = config, model
        self.trainable = count_parameters(parts.trainable)
        self.frozen = count_parameters(parts.frozen.base)
        self.frozen_bytes, self.state_bytes = map(bytes_per_device, (parts.frozen, state))
        self.remat = parts.spec.remat
        passes = 3 if self.remat in ("full", "offload") else 2
        self.passes = micro_batches_of(config) * passes
        self.shards = {axis: axis_size(self.mesh, axis) for axis in ("batch", "seq")}

    def compile(self, platform: str | None = None) -> Any:
        """Compile the step for a platform, or for this machine."""
        with jax.set_mesh(self.mesh):
            return self.traced.lower(lowering_platforms=(platform,) if platform else None).compile()
