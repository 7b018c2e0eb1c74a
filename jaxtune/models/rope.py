"""Rotary position embedding in the half-split form (Su et al. 2021), and how it is stretched to
longer texts.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.models.config import RopeConfig


class Rope(NamedTuple):
    """Cosine and sine of every position's angles, float32."""

    cos: Float[Array, "batch seq half"]
    sin: Float[Array, "batch seq half"]


def rope_cos_sin(
    config: RopeConfig,
    head_dim: int,
    max_positions: int,
    positions: Int[Array, "batch seq"],
    lengths: Int[Array, "batch seq"],
) -> Rope:
    """Return the cosine and sine of position x frequency, in float32 whatever the compute dtype.

    Args:
        config: kind of RoPE and its numbers.
        head_dim: size of a head; there is a frequency for every two dimensions that are rotated.
        max_positions: the model's `max_position_embeddings`, which some kinds refer to.
        positions: position of each token in its segment.
        lengths: length of each token's segment, on which the frequencies of `dynamic` and
            `longrope` depend. transformers uses the longest text of the batch; here a text's
            numbers do not depend on what else is in the batch.

    """
    rotated = int(head_dim * config.partial)
    frequencies, scale = _frequencies(config, rotated, max_positions, lengths)
    angle = positions.astype(jnp.float32)[..., None] * frequencies
    return Rope(jnp.cos(angle) * scale, jnp.sin(angle) * scale)


def segment_lengths(
    positions: Int[Array, "batch seq"], segments: Int[Array, "batch seq"]
) -> Int[Array, "batch seq"]:
    """Return the length of each token's segment: one more than the largest position in it."""
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1) + 1


def no_rotation(like: Rope) -> Rope:
    """Return the rotation of a layer without positions (NoPE), which changes nothing."""
    return Rope(jnp.ones_like(like.cos), jnp.zeros_like(like.sin))


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"], rope: Rope
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (x_i, x_{i + r/2}) of the first r dimensions; the others pass unchanged."""
    half = rope.cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rest = [wide[..., 2 * half :]] if 2 * half < x.shape[-1] else []
    return jnp.concatenate(rotated + rest, axis=-1).astype(x.dtype)


def _frequencies(
    config: RopeConfig, size: int, max_positions: int, lengths: Int[Array, "batch seq"]
) -> tuple[Float[Array, "*by_token half"], float]:
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    if config.kind == "dynamic":
        theta = _dynamic_theta(config, size, max_positions, lengths)
        return 1.0 / theta[..., None] ** exponents, 1.0
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.get("factor"), 1.0
    if config.kind == "llama3":
        return _llama3(config, plain), 1.0
    if config.kind == "yarn":
        return _yarn(config, plain, size, max_positions)
    if config.kind == "longrope":
        return _longrope(config, plain, max_positions, lengths)
    return plain, 1.0


def _dynamic_theta(
    config: RopeConfig, size: int, max_positions: int, lengths: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Return the NTK-aware base, which grows with the length of the text."""
    factor = config.get("factor")
    length = jnp.maximum(lengths, max_positions).astype(jnp.float32)
    stretch = factor * length / max_positions - (factor - 1)
    return config.theta * stretch ** (size / (size - 2))


def _longrope(
    config: RopeConfig,
    plain: Float[Array, " half"],
    max_positions: int,
    lengths: Int[Array, "batch seq"],
) -> tuple[Float[Array, "batch seq half"], float]:
    """Return the frequencies and the scale of LongRoPE (Ding et al. 2024): each frequency has a
    divisor for short texts and one for long texts.
    """
    context = config.get("original_max_position_embeddings") or max_positions
    short, long = (
        plain / jnp.asarray(config.get(name), jnp.float32)
        for name in ("short_factor", "long_factor")
    )
    scale = attention_factor(config, max_positions)
    return jnp.where((lengths > context)[..., None], long, short), scale


def _llama3(config: RopeConfig, plain: Float[Array, " half"]) -> Float[Array, " half"]:
    """Return the frequencies of Llama 3.1: low ones are divided by the factor, high ones are kept,
    and those between are a linear blend.
    """
    factor, context = config.get("factor"), config.get("original_max_position_embeddings")
    low, high = config.get("low_freq_factor"), config.get("high_freq_factor")
    wavelength = 2 * math.pi / plain
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    stretched = jnp.where(wavelength > context / low, plain / factor, plain)
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return jnp.where(between, blended, stretched)


def _yarn(
    config: RopeConfig, plain: Float[Array, " half"], head_dim: int, max_positions: int
) -> tuple[Float[Array, " half"], float]:
    """Return the frequencies and the scale of YaRN (Peng et al. 2023, sections 3.2 and 3.4):
    interpolation by wavelength, and a temperature of the attention as a factor of both q and k.
    """
    factor = config.get("factor")
    context = config.get("original_max_position_embeddings") or max_positions

    def dimension(rotations: float) -> float:
        return (
            head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))
        )

    low, high = dimension(config.get("beta_fast") or 32), dimension(config.get("beta_slow") or 1)
    if config.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), attention_factor(config, max_positions)


def attention_factor(config: RopeConfig, max_positions: int) -> float:
    """Return the factor of cosine and sine, by which YaRN and LongRoPE temper the attention: the
    one that is given, else by the paper's formula; 1 for the other kinds.
    """
    if (given := config.get("attention_factor")) is not None:
        return given
    if config.kind == "longrope":
        context = config.get("original_max_position_embeddings") or max_positions
        factor = config.get("factor") or max_positions / context
        return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    if config.kind != "yarn":
        return 1.0
    mscale, mscale_all = config.get("mscale"), config.get("mscale_all_dim")
    if mscale and mscale_all:
        factor = config.get("factor")
        return yarn_temperature(factor, mscale) / yarn_temperature(factor, mscale_all)
    return yarn_temperature(config.get("factor"))


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's factor of q and k for texts `factor` times as long (section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
