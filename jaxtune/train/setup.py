"""From a configuration to everything a run needs: data first, weights last, so that a mistake is found before they load."""

from dataclasses import dataclass
from datetime import date
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import LoRAConfig
from jaxtune.adapters.inject import adapted, inject, split_trainable
from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.core.files import shown
from jaxtune.core.mesh import make_mesh
from jaxtune.data.loader import Plan, check_divides
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.sft import sft
from jaxtune.train.inputs import account, read_inputs
from jaxtune.train.optim import optimizer
from jaxtune.train.progress import Reporter
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter
from jaxtune.weights.source import Source
from jaxtune.weights.vocabulary import Grown

OBJECTIVES = {"sft": sft}
AUTO_REMAT = "dots"


@dataclass
class Setup:
    """The parts of a run.

    Attributes:
        config: the resolved configuration.
        mesh: the devices.
        source, tokenizer: the base model's origin and its tokenizer.
        graph, trainable, frozen: the model, split once.
        plan: every batch of the run.
        eval_plan: the evaluation's batches, None where there is no evaluation data.
        optimizer: the update rule over the whole run.

    """

    config: Config
    mesh: Mesh
    source: Source
    tokenizer: Any
    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    plan: Plan
    eval_plan: Plan | None
    optimizer: optax.GradientTransformation

    @property
    def cuts(self) -> int:
        """Micro-batches per optimizer step."""
        train = self.config.train
        return train.batch_size // (train.micro_batch_size or train.batch_size)

    @property
    def remat(self) -> str:
        """The remat policy, `auto` resolved."""
        return AUTO_REMAT if self.config.train.remat == "auto" else self.config.train.remat

    def model(self, trainable: nnx.State) -> CausalLM:
        """The model with these trainable leaves."""
        return nnx.merge(self.graph, trainable, self.frozen)


def setup(config: Config, reporter: Reporter, day: date | None = None) -> Setup:
    """Build a run.

    Args:
        config: the resolved configuration.
        reporter: progress.
        day: the date for chat templates that print one; today's by default.

    Raises:
        UserError: anything that is wrong with the configuration, the data or the weights.

    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_divides(config.train.micro_batch_size or config.train.batch_size, mesh, _rows_key(config))
    inputs = read_inputs(config, reporter, day)
    account(inputs.plans, reporter)
    source, adapter = inputs.source, inputs.adapter
    reporter.say(f"Loading {shown(config.model.source)}")
    model = load_model(source, mesh, dtype=config.model.dtype, compute=config.model.compute_dtype)
    numbers = config.adapter
    if adapter is None:
        targets = numbers.targets if isinstance(numbers.targets, str) else tuple(numbers.targets)
        saved = ("embed_tokens", "lm_head") if numbers.train_tokens == "all" else ()
        tokens = {} if saved else _token_rows(model, source)
        lora = LoRAConfig(
            numbers.rank,
            numbers.alpha,
            numbers.dropout,
            numbers.rslora,
            targets=targets,
            saved=saved,
            tokens=tuple(tokens.items()),
            tokens_train=numbers.train_tokens == "new",
        )
        inject(model, lora, config.train.seed, mesh)
    else:
        attach(model, adapter, mesh, numbers.dropout)
    graph, trainable, frozen = split_trainable(model)
    _announce(model, trainable, frozen, mesh, reporter)
    if isinstance(source, Grown) and adapter is None:
        _announce_tokens(source, numbers.train_tokens, reporter)
    update = optimizer(config.optimizer, len(inputs.plan))
    return Setup(config, mesh, source, inputs.tokenizer, graph, trainable, frozen, inputs.plan, inputs.eval_plan, update)


def adopt_adapter(config: Config) -> Config:
    """The configuration with the rank, scale and targets of the adapter it starts from, if it starts from one.

    Raises:
        UserError: the configuration says another rank, alpha or scaling than the adapter has.

    """
    if config.adapter.init is None:
        return config
    adapter = open_adapter(config.adapter.init)
    found = {
        "rank": adapter.config.rank,
        "alpha": adapter.config.alpha,
        "rslora": adapter.config.rslora,
        "targets": adapter.config.targets if isinstance(adapter.config.targets, str) else list(adapter.config.targets),
    }
    for key, value in found.items():
        if key in config.adapter.model_fields_set and getattr(config.adapter, key) != value:
            raise UserError(
                f"adapter.{key} = {getattr(config.adapter, key)}, and adapter.init has {value}. Remove adapter.{key}, or set it to that."
            )
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=found)})


def _announce(model: CausalLM, trainable: nnx.State, frozen: nnx.State, mesh: Mesh, reporter: Reporter) -> None:
    train, rest = parameters(trainable), parameters(frozen)
    device = jax.devices()[0].device_kind
    reporter.say(
        f"LoRA on {len(adapted(model))} linear maps in each of {model.config.num_layers} layers: {train:,} parameters train "
        f"({train / (train + rest):.2%}), {rest:,} frozen; {mesh.size} x {device}, {model.compute_dtype.name}"
    )


def _token_rows(model: CausalLM, source: Source) -> dict[str, tuple[int, ...]]:
    """The rows of new tokens that come with the adapter, by module."""
    if not isinstance(source, Grown):
        return {}
    return dict.fromkeys(("embed_tokens", "lm_head")[: 1 if model.lm_head is None else 2], source.fresh)


def _announce_tokens(source: Grown, train: str, reporter: Reporter) -> None:
    note = "train" if train != "none" else "do NOT train; to train them set adapter.train_tokens=new"
    reporter.say(f"{source.describe()}: their rows begin at the mean of the others and {note}")


def parameters(state: nnx.State) -> int:
    """Numbers in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def _rows_key(config: Config) -> str:
    return "train.micro_batch_size" if config.train.micro_batch_size else "train.batch_size"
