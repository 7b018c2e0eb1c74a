"""Rules that keys must keep together: each a condition that breaks it, and what to change.

A message is a format string over the fields of the section that the rule is for.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from jaxtune.config.schema import Config, DataSection
    from jaxtune.config.sweep import Range, Sweep

T = TypeVar("T")


class Rule(NamedTuple, Generic[T]):
    """One rule.

    Attributes:
        is_broken: whether a section breaks it.
        message: what is wrong and what to change.

    """

    is_broken: Callable[[T], bool]
    message: str


def _trains_weights(config: "Config") -> bool:
    return config.adapter.method == "none"


def _evaluates(config: "Config") -> bool:
    data = config.data
    return bool(config.train.eval_every) and (data.eval is not None or data.split is not None)


def _is_schedule_free(config: "Config") -> bool:
    return config.optimizer.name == "schedule-free"


def _smooths(config: "Config") -> bool:
    """Return whether the loss is of the logistic kind, in which labels may be smoothed."""
    objective = config.train.objective
    return objective == "simpo" or (objective == "dpo" and config.preference.dpo_loss == "sigmoid")


CONFIG_RULES: "Sequence[Rule[Config]]" = (
    Rule(
        lambda c: c.train.batch_size % (c.train.micro_batch_size or 1) != 0,
        "train.micro_batch_size ({train.micro_batch_size}) must divide train.batch_size "
        "({train.batch_size})",
    ),
    Rule(
        lambda c: c.checkpoint.best is not None and not _evaluates(c),
        "checkpoint.best needs evaluations. Set train.eval_every, and data.eval or data.split",
    ),
    Rule(
        lambda c: c.checkpoint.best == "margin" and not c.on_pairs,
        "checkpoint.best=margin is for preferences. Set checkpoint.best=loss",
    ),
    Rule(
        lambda c: c.on_pairs and c.checkpoint.best not in (None, "loss", "accuracy", "margin"),
        "of preferences checkpoint.best is loss, accuracy or margin",
    ),
    Rule(
        lambda c: c.train.patience is not None and not _evaluates(c),
        "train.patience counts evaluations. Set train.eval_every, and data.eval or data.split",
    ),
    Rule(
        lambda c: not _trains_weights(c) and c.trainable != "all",
        "trainable names weights, and adapter.method is an adapter. Set adapter.method=none",
    ),
    Rule(
        lambda c: _trains_weights(c) and c.trainable == "all" and c.model.dtype in ("int8", "nf4"),
        "trainable=all leaves nothing frozen that model.dtype could quantize. Set "
        "model.dtype=float32 or bfloat16",
    ),
    Rule(
        lambda c: c.model.products == "int8" and c.model.dtype != "int8",
        "model.products=int8 multiplies the codes of model.dtype=int8. Set that too",
    ),
    Rule(
        lambda c: _trains_weights(c) and c.adapter.init is not None,
        "adapter.init is for adapters, and adapter.method is none",
    ),
    Rule(
        lambda c: _trains_weights(c) and c.adapter.train_tokens != "none",
        "adapter.train_tokens is for adapters. With adapter.method=none name embeddings in "
        "trainable",
    ),
    Rule(
        lambda c: c.adapter.init == "pissa" and c.adapter.method != "lora",
        "adapter.init=pissa is for adapter.method=lora",
    ),
    Rule(
        lambda c: _trains_weights(c) and c.optimizer.lora_plus is not None,
        "optimizer.lora_plus is for adapters, and adapter.method is none",
    ),
    Rule(
        lambda c: (
            c.optimizer.learning_rate == "auto"
            and (c.optimizer.name != "adamw" or c.train.objective != "sft")
        ),
        "optimizer.learning_rate=auto is a rule for AdamW and train.objective=sft. Give a number",
    ),
    Rule(
        lambda c: _is_schedule_free(c) and c.optimizer.schedule != "constant",
        "optimizer.name=schedule-free replaces the schedule. Set optimizer.schedule=constant",
    ),
    Rule(
        lambda c: _is_schedule_free(c) and c.optimizer.betas[0] == 0,
        "optimizer.name=schedule-free averages by the first of optimizer.betas, which must be "
        "above 0. Set optimizer.betas=[0.9, 0.999]",
    ),
    Rule(
        lambda c: c.preference.label_smoothing > 0 and not _smooths(c),
        "preference.label_smoothing is for train.objective=simpo and for dpo with "
        "preference.dpo_loss=sigmoid, and train.objective is {train.objective}. Set it to 0",
    ),
    Rule(
        lambda c: c.on_pairs and c.data.train_on == "all",
        "train.objective={train.objective} compares the last answer of each row, and nothing else "
        "is trained. Leave data.train_on out",
    ),
    Rule(
        lambda c: _is_schedule_free(c) and c.train.ema > 0,
        "optimizer.name=schedule-free averages by itself. Set train.ema=0",
    ),
    Rule(
        lambda c: c.train.objective == "distill" and c.distill.teacher is None,
        "train.objective=distill needs distill.teacher",
    ),
    Rule(
        lambda c: c.train.objective != "distill" and c.distill.teacher is not None,
        "distill.teacher is set, and train.objective is not distill",
    ),
)

DATA_RULES: "Sequence[Rule[DataSection]]" = (
    Rule(
        lambda data: data.split is not None and data.eval is not None,
        "data.split and data.eval are both set. Keep one of them",
    ),
    Rule(
        lambda data: not 0 <= data.fraction < 1,
        "data.split ({split}) must lie below 100%",
    ),
)

RANGE_RULES: "Sequence[Rule[Range]]" = (
    Rule(lambda r: not r.low < r.high, "low ({low}) must be below high ({high})"),
    Rule(
        lambda r: r.log and (r.low <= 0 or r.step is not None),
        "log needs low above 0, and no step",
    ),
)

SWEEP_RULES: "Sequence[Rule[Sweep]]" = (
    Rule(
        lambda sweep: sweep.sampler == "grid" and bool(sweep.ranges),
        "sampler: grid takes lists of values, and a parameter has a range. Write the values out, "
        "or take tpe",
    ),
)
