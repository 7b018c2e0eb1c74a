"""The optimizer and its schedule, both counted in optimizer steps."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtune.config.schema import Config, OptimizerSection
from jaxtune.core.errors import UserError, listed
from jaxtune.core.patterns import fullmatch
from jaxtune.models.config import ModelConfig
from jaxtune.models.names import names_of

DECAY_SHARE = 0.2
# RMS of an update's entries, that of AdamW's updates, so that its rates fit (Liu et al. 2025).
_MUON_RMS = 0.2
_FULL_RATE, _LORA_FACTOR, _WIDTH = 5e-5, 10.0, 2000.0
_POWER = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}


def auto_rate(config: ModelConfig, lora: bool) -> float:
    """Return 5e-5 (2000 / hidden size)^p, p = 0.781 for Llama and 0.0775 for Qwen; for LoRA ten
    times that.

    Thinking Machines' rule for AdamW, fitted to their sweeps (LoRA Without Regret, 2025); it
    depends neither on the rank nor on the task.

    Raises:
        UserError: a family that the rule was not fitted to.

    """
    family = config.raw.get("model_type", "")
    if family not in _POWER:
        raise UserError(
            f"optimizer.learning_rate=auto: the rule is for {listed(_POWER)}, not for {family}. "
            "Give a number, such as 2e-4."
        )
    return (
        _FULL_RATE
        * (_LORA_FACTOR if lora else 1.0)
        * (_WIDTH / config.hidden_size) ** _POWER[family]
    )


def resolve_learning_rate(config: Config, model: ModelConfig) -> Config:
    """Return the configuration with a number for `optimizer.learning_rate` = auto.

    Raises:
        UserError: see `auto_rate`.

    """
    if config.optimizer.learning_rate != "auto":
        return config
    rate = auto_rate(model, lora=config.adapter.method != "none")
    optimizer = config.optimizer.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"optimizer": optimizer})


def warmup_steps(config: OptimizerSection, steps: int) -> int:
    """Return the steps of warmup: `warmup` itself; below 1 it is a fraction of all steps."""
    return math.ceil(config.warmup * steps) if config.warmup < 1 else min(int(config.warmup), steps)


def learning_rate_schedule(config: OptimizerSection, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step's index 0, 1, 2 ...

    The warmup's k-th step (from 1) has k / warmup of the peak, so no step is spent at zero; after
    it the cosine and the line are those of transformers' schedulers, at the same step.

    Args:
        config: peak, kind and warmup; the peak is a number here.
        steps: optimizer steps of the whole run.

    """
    assert config.learning_rate != "auto"
    warmup, peak = warmup_steps(config, steps), config.learning_rate
    rest = max(steps - warmup, 1)
    decay = max(round(DECAY_SHARE * rest), 1)

    def rate(index):
        index = jnp.asarray(index, jnp.float32)
        left = jnp.clip((warmup + rest - index) / rest, 0.0, 1.0)
        shape = {
            "cosine": jnp.square(
                jnp.sin(0.5 * jnp.pi * left)
            ),  # = (1 + cos(pi (1 - left))) / 2, exact near zero
            "linear": left,
            "constant": jnp.ones_like(left),
            "wsd": jnp.clip((steps - index) / decay, 0.0, 1.0),
        }[config.schedule]
        return peak * jnp.where(index < warmup, (index + 1) / max(warmup, 1), shape)

    return rate


@dataclass(frozen=True)
class Leaf:
    """What the update rule must know of a leaf.

    Attributes:
        names: Hugging Face's names of the modules in it.
        name: its own, such as `weight` or `lora_A`.
        stack: leading axes of stacked layers.
        matrix: whether it is a matrix; else a vector, such as a norm, a bias or a magnitude.
        vocabulary: whether one of its sides is the vocabulary.
        lora_plus: whether LoRA+ has its higher rate.

    """

    names: tuple[str, ...]
    name: str
    stack: int
    matrix: bool
    vocabulary: bool
    lora_plus: bool = False


def leaves_of(trainable: nnx.State, config: ModelConfig) -> list[Leaf]:
    """Return what the update rule must know of each leaf that trains, in the tree's order."""
    leaves = []
    for path, variable in nnx.to_flat_state(trainable):
        metadata = variable.get_metadata()
        axes = metadata["axes"]
        names = tuple(
            name.removesuffix(".weight") for name in names_of((*path[:-1], "weight"), config)[1]
        )
        value = variable.get_value()
        leaves.append(
            Leaf(
                names,
                str(path[-1]),
                value.ndim - len(axes),
                len(axes) > 1,
                "vocab" in axes,
                bool(metadata.get("lora_plus", False)),
            )
        )
    return leaves


def build_optimizer(
    config: OptimizerSection, steps: int, leaves: list[Leaf]
) -> optax.GradientTransformation:
    """Build the update rule of a whole run: clipping by the global norm, then the rule, decoupled
    decay, and each leaf's rate.

    Args:
        config: the rule and its numbers; the rate is a number here.
        steps: optimizer steps of the whole run.
        leaves: see `leaves_of`.

    Raises:
        UserError: an entry of `rates` that matches nothing that trains.

    """
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    rate, factors = learning_rate_schedule(config, steps), _factors(config, leaves)
    rest = optax.chain(
        optax.add_decayed_weights(
            config.weight_decay, partial(_like, [leaf.matrix for leaf in leaves])
        ),
        optax.stateless(
            lambda updates, _: jax.tree.map(jnp.multiply, updates, _like(factors, updates))
        ),
        optax.scale_by_learning_rate(rate),
    )
    rule = optax.chain(_direction(config, leaves), rest)
    if config.name == "schedule-free":
        rule = optax.contrib.schedule_free(rule, rate, b1=config.betas[0])
    return optax.chain(clip, rule)


def eval_params(config: OptimizerSection, opt_state: Any, trainable: nnx.State) -> nnx.State:
    """Return the leaves to evaluate and export: those that train; of schedule-free AdamW, their
    average.
    """
    if config.name != "schedule-free":
        return trainable
    return optax.contrib.schedule_free_eval_params(opt_state[-1], trainable)


def _direction(config: OptimizerSection, leaves: list[Leaf]) -> optax.GradientTransformation:
    """Return the rule without decay and rate."""
    first, second = config.betas
    if config.name == "adafactor":
        # Shazeer & Stern 2018, with a given rate and without the parameters' scale
        rule = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        return _by_matrix(rule, [leaf.stack for leaf in leaves])
    if config.name == "muon":
        kinds = ["muon" if leaf.matrix and not leaf.vocabulary else "adam" for leaf in leaves]
        rules: dict[Any, Any] = {
            "muon": _muon(first, config.eps),
            "adam": optax.scale_by_adam(first, second, config.eps),
        }
        return optax.partition(rules, partial(_like, kinds))
    return {
        "adamw": optax.scale_by_adam(first, second, config.eps),  # Loshchilov & Hutter 2019
        "lion": optax.scale_by_lion(first, second),  # Chen et al. 2023
        "sgd": optax.trace(first) if first else optax.identity(),
        "schedule-free": optax.scale_by_adam(0.0, second, config.eps),  # Defazio et al. 2024
    }[config.name]


def _muon(momentum: float, eps: float) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024), its momentum bias-corrected, for matrices.

    Vectors, and matrices with the vocabulary for a side, are AdamW's.
    """

    def sides(updates: Any) -> Any:
        return jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2), updates
        )

    def sized(update: jax.Array) -> jax.Array:
        return update * (_MUON_RMS * math.sqrt(max(update.shape[-2:])))

    rule = optax.contrib.scale_by_muon(beta=momentum, eps=eps, weight_dimension_numbers=sides)
    return optax.chain(rule, optax.stateless(lambda updates, _: jax.tree.map(sized, updates)))


def _factors(config: OptimizerSection, leaves: list[Leaf]) -> list[float]:
    """Return what each leaf's rate is multiplied by: `rates`, else `lora_plus` for B (Hayou et al.
    2024) and, as in PEFT, for vectors (DoRA's lengths, biases, norms), else 1.
    """
    assert config.learning_rate != "auto"
    for pattern in config.rates:
        if not any(_named(pattern, leaf) for leaf in leaves):
            known = sorted({name.rpartition(".")[2] for leaf in leaves for name in leaf.names})
            raise UserError(
                f"optimizer.rates: '{pattern}' matches nothing that trains; there are "
                f"{listed(known, 20)}."
            )
    factors = []
    for leaf in leaves:
        own = next(
            (value for pattern, value in config.rates.items() if _named(pattern, leaf)), None
        )
        plus = config.lora_plus if config.lora_plus and leaf.lora_plus else 1.0
        factors.append(plus if own is None else own / config.learning_rate)
    return factors


def _named(pattern: str, leaf: Leaf) -> bool:
    """Return whether the pattern matches the modules of a leaf.

    One that matches some of them only is an error, since they are one array.
    """
    hits = {
        fullmatch(rf"(.*\.)?({pattern})(\..*)?", f"{name}.{leaf.name}") is not None
        for name in leaf.names
    }
    if len(hits) > 1:
        raise UserError(
            f"optimizer.rates: '{pattern}' matches some layers of {listed(leaf.names, 3)} only. "
            "Name modules, not single layers."
        )
    return True in hits


def _like(values: list[Any], tree: Any) -> Any:
    """Return the values as a tree of this structure."""
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def _by_matrix(
    rule: optax.GradientTransformation, stacks: list[int]
) -> optax.GradientTransformation:
    """Return the rule for each matrix by itself, where a leaf is a stack of them."""

    def over(function: Any, depth: int) -> Any:
        for _ in range(depth):
            function = jax.vmap(function)
        return function

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(
            over(rule.init, depth)(leaf)
            for leaf, depth in zip(jax.tree.leaves(params), stacks, strict=True)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        parts = zip(jax.tree.leaves(updates), state, jax.tree.leaves(params), stacks, strict=True)
        done = [
            over(rule.update, depth)(grad, moments, leaf) for grad, moments, leaf, depth in parts
        ]
        return _like([step for step, _ in done], updates), tuple(moments for _, moments in done)

    return optax.GradientTransformation(init, update)
