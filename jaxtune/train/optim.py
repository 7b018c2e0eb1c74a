"""The optimizer and its schedule, both counted in optimizer steps."""

import math

import jax.numpy as jnp
import optax

from jaxtune.config.schema import OptimizerSection

DECAY_SHARE = 0.2


def warmup_steps(config: OptimizerSection, steps: int) -> int:
    """Steps of warmup: `warmup` itself, or a fraction of all steps where it is below 1."""
    return math.ceil(config.warmup * steps) if config.warmup < 1 else min(int(config.warmup), steps)


def schedule(config: OptimizerSection, steps: int) -> optax.Schedule:
    """Learning rate of the step with index 0, 1, 2 ...

    The warmup's k-th step (from 1) has k / warmup of the peak, so no step is spent at zero; after it the cosine and
    the line are those of transformers' schedulers, at the same step.

    Args:
        config: peak, kind and warmup.
        steps: optimizer steps of the whole run.

    """
    warmup, peak = warmup_steps(config, steps), config.learning_rate
    rest = max(steps - warmup, 1)
    decay = max(round(DECAY_SHARE * rest), 1)

    def rate(index):
        index = jnp.asarray(index, jnp.float32)
        after = jnp.clip((index - warmup) / rest, 0.0, 1.0)
        shape = {
            "cosine": jnp.square(jnp.sin(0.5 * jnp.pi * (1 - after))),  # = (1 + cos(pi after)) / 2, exact near zero
            "linear": 1 - after,
            "constant": jnp.ones_like(after),
            "wsd": jnp.clip((steps - index) / decay, 0.0, 1.0),
        }[config.schedule]
        return peak * jnp.where(index < warmup, (index + 1) / max(warmup, 1), shape)

    return rate


def optimizer(config: OptimizerSection, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) with clipping by the global norm before it."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    first, second = config.betas
    return optax.chain(clip, optax.adamw(schedule(config, steps), first, second, config.eps, weight_decay=config.weight_decay))
