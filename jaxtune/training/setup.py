"""From a configuration to the parts of a run: data first, weights last, so that mistakes show
before the weights load.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.inject import partition_trainable
from jaxtune.config.schema import Config
from jaxtune.core import distributed
from jaxtune.core.files import shown
from jaxtune.core.hardware import bytes_per_device, device_capacity
from jaxtune.core.mesh import make_mesh
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.loader import BatchSchedule, check_divides
from jaxtune.models.decoder import CausalLM
from jaxtune.models.kernels.quantized import QuantizedTensor
from jaxtune.objectives.objective import Objective
from jaxtune.objectives.registry import build_objective
from jaxtune.tracking.progress import Reporter
from jaxtune.training.inputs import read_inputs, report_data
from jaxtune.training.methods import describe_training, trained_model
from jaxtune.training.optimizer import (
    build_optimizer,
    eval_params,
    leaves_of,
    resolve_learning_rate,
)
from jaxtune.training.remat_auto import MemoryBudget, choose_policy
from jaxtune.training.state import Frozen, TrainState, init_state, state_layout
from jaxtune.training.step import StepSpec
from jaxtune.weights.load import load_model
from jaxtune.weights.source import Source
from jaxtune.weights.vocabulary import ResizedSource

_COPIES = 4  # of what trains: itself, two moments, a gradient


class StepParts(NamedTuple):
    """The step's parts.

    Attributes:
        spec: the model's structure, the objective and how it is run.
        trainable: the leaves that train, as training begins.
        frozen: everything else.
        optimizer: the update rule over the whole run.

    """

    spec: StepSpec
    trainable: nnx.State
    frozen: Frozen
    optimizer: optax.GradientTransformation


@dataclass
class Setup:
    """The parts of a run.

    Attributes:
        config: the resolved configuration, its learning rate a number.
        mesh: the devices.
        source, tokenizer: the base model's origin and its tokenizer.
        spec, trainable, frozen, optimizer: see `StepParts`.
        schedule: every batch of the run.
        eval_schedule: the evaluation's batches, None where there is no evaluation data.
        stop_ids: tokens that end an answer.

    """

    config: Config
    mesh: Mesh
    source: Source
    tokenizer: Tokenizer
    spec: StepSpec
    trainable: nnx.State
    frozen: Frozen
    optimizer: optax.GradientTransformation
    schedule: BatchSchedule
    eval_schedule: BatchSchedule | None
    stop_ids: Sequence[int] = ()

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the whole run, over which its schedule goes."""
        return len(self.schedule)

    @property
    def micro_batches(self) -> int:
        """Return the micro-batches per optimizer step."""
        return micro_batches_of(self.config)

    @cached_property
    def state_layout(self) -> TrainState:
        """Return the shapes and shardings of the state."""
        train = self.config.train
        return state_layout(
            self.trainable, self.optimizer, train.seed, self.mesh, average=train.ema > 0
        )

    def initial(self) -> TrainState:
        """Return the state before the first step, its leaves copied: the step donates its state,
        and the leaves are used again.
        """
        train, optimizer = self.config.train, self.optimizer
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_layout)
        make = jax.jit(
            lambda leaves: init_state(
                jax.tree.map(jnp.copy, leaves), optimizer, train.seed, average=train.ema > 0
            ),
            out_shardings=shardings,
        )
        return make(self.trainable)

    def release(self) -> None:
        """Free the leaves as training began, once there is a state."""
        self.trainable = self.state_layout.trainable

    def eval_params(self, state: TrainState) -> nnx.State:
        """Return the leaves to evaluate and export: those that train, or their average."""
        return (
            eval_params(self.config.optimizer, state.opt_state, state.trainable)
            if state.average is None
            else state.average
        )

    def model(self, state: TrainState) -> CausalLM:
        """Return the model to evaluate and export."""
        return nnx.merge(self.spec.graph, self.eval_params(state), self.frozen.base)


def build_setup(
    config: Config,
    reporter: Reporter,
    day: date | None = None,
    objective: Objective | None = None,
) -> Setup:
    """Build the parts of a run.

    Args:
        config: the resolved configuration.
        reporter: progress.
        day: the date for chat templates that print one; today's by default.
        objective: what to minimize; by default that of `train.objective`, which also says what the
            data looks like.

    Raises:
        UserError: anything that is wrong with the configuration, the data or the weights.

    """
    mesh = make_mesh(
        config.mesh.data,
        config.mesh.fsdp,
        config.mesh.tensor,
        config.mesh.context,
        config.mesh.slices,
    )
    check_divides(config, mesh)
    inputs = read_inputs(config, reporter, day)
    report_data(inputs.schedules, reporter)
    source = inputs.source
    reporter.say(f"Loading {shown(config.model.source)}")
    model = trained_model(config, source, inputs.adapter, mesh)
    if config.optimizer.learning_rate == "auto":
        config = resolve_learning_rate(config, model.config)
        reporter.say(f"optimizer.learning_rate=auto: {config.optimizer.learning_rate:.2e}")
    teacher = None
    if inputs.teacher is not None:
        reporter.say(f"Loading {shown(inputs.teacher.name)}, the teacher")
        teacher = load_model(inputs.teacher, mesh, compute=config.model.compute_dtype)
    steps = len(inputs.schedule)
    parts = assemble_step(config, model, steps, teacher, mesh, objective=objective)
    if config.train.remat == "auto" and parts.spec.remat != "dots":
        reporter.say(f"train.remat=auto: {parts.spec.remat}, since more seems not to fit")
    counts = (count_parameters(parts.trainable), count_parameters(parts.frozen.base))
    reporter.say(describe_training(config, model, *counts, mesh))
    if isinstance(source, ResizedSource) and inputs.adapter is None:
        _announce_tokens(source, config, reporter)
    schedules = (inputs.schedule, inputs.eval_schedule)
    return Setup(
        config, mesh, source, inputs.tokenizer, *parts, *schedules, stop_ids=inputs.stop_ids
    )


def assemble_step(
    config: Config,
    model: CausalLM,
    steps: int,
    teacher: CausalLM | None = None,
    mesh: Mesh | None = None,
    memory: int | None = None,
    *,
    objective: Objective | None = None,
) -> StepParts:
    """Assemble the parts of the step.

    Args:
        config: the resolved configuration, its learning rate a number.
        model: as training begins; see `methods.trained_model`.
        steps: optimizer steps of the whole run.
        teacher: for distillation.
        mesh: the devices; one by default.
        memory: bytes of each device, for train.remat=auto; by default as this machine's.
        objective: what to minimize; by default that of `train.objective`.

    Raises:
        UserError: see `optimizer.build_optimizer`.

    """
    train, objective = config.train, objective or build_objective(config)
    graph, trainable, base = partition_trainable(model)
    structure, leaves = (None, None) if teacher is None else nnx.split(teacher)
    policy = train.remat
    if policy == "auto":
        fixed = bytes_per_device((base, leaves)) + _COPIES * bytes_per_device(trainable)
        budget = MemoryBudget(device_capacity() if memory is None else memory, fixed)
        policy = distributed.broadcast_from_main(lambda: choose_policy(config, model, mesh, budget))
    spec = StepSpec(
        graph,
        objective,
        policy,
        config.model.products == "int8",
        random=config.adapter.dropout > 0 or train.neftune > 0,
        noise=train.neftune,
        teacher=structure,
    )
    start = jax.tree.map(_copied, trainable) if objective.has_reference else None
    update = build_optimizer(config.optimizer, steps, leaves_of(trainable, model.config))
    return StepParts(spec, trainable, Frozen(base, start, leaves), update)


def _copied(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.copy(leaf)


def _announce_tokens(source: ResizedSource, config: Config, reporter: Reporter) -> None:
    note = (
        "train"
        if config.adapter.train_tokens != "none"
        else "do NOT train; to train them set adapter.train_tokens=new"
    )
    if config.adapter.method == "none":
        note = "train where trainable takes the embeddings"
    reporter.say(f"{source.describe()}: their rows begin at the mean of the others and {note}")


def micro_batches_of(config: Config) -> int:
    """Return the micro-batches per optimizer step."""
    return config.train.batch_size // (config.train.micro_batch_size or config.train.batch_size)


def count_parameters(state: nnx.State) -> int:
    """Count the numbers in a state."""
    return sum(
        leaf.size
        for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    )
