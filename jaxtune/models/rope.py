"""Rotary position embedding in the half-split form (Su et al. 2021), and the ways it is stretched to longer texts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.models.config import RopeConfig


class Rope(NamedTuple):
    """Cosine and sine of every position's phases, float32."""

    cos: Float[Array, "batch seq half"]
    sin: Float[Array, "batch seq half"]


def phases(config: RopeConfig, head_dim: int, max_positions: int, positions: Int[Array, "batch seq"]) -> Rope:
    """Cos and sin of position x inverse frequency, in float32 whatever the compute dtype.

    Args:
        config: kind of RoPE and its numbers.
        head_dim: size of a head; half as many frequencies.
        max_positions: the model's `max_position_embeddings`, which `dynamic` and `yarn` refer to.
        positions: position of each token in its segment.

    """
    frequencies, scale = _frequencies(config, head_dim, max_positions, positions)
    angle = positions.astype(jnp.float32)[..., None] * frequencies
    return Rope(jnp.cos(angle) * scale, jnp.sin(angle) * scale)


def rotate(x: Float[Array, "batch seq heads head_dim"], rope: Rope) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (x_i, x_{i + head_dim/2}) by their phase."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(
    config: RopeConfig, head_dim: int, max_positions: int, positions: Int[Array, "batch seq"]
) -> tuple[Float[Array, " half"], float]:
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    if config.kind == "dynamic":
        return 1.0 / _dynamic_theta(config, head_dim, max_positions, positions) ** exponents, 1.0
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.get("factor"), 1.0
    if config.kind == "llama3":
        return _llama3(config, plain), 1.0
    if config.kind == "yarn":
        return _yarn(config, plain, head_dim, max_positions)
    return plain, 1.0


def _dynamic_theta(config: RopeConfig, head_dim: int, max_positions: int, positions: Int[Array, "batch seq"]) -> jax.Array:
    """NTK-aware base that grows with the longest text in the batch, as transformers computes it."""
    factor = config.get("factor")
    length = jnp.maximum(jnp.max(positions) + 1, max_positions).astype(jnp.float32)
    stretch = factor * length / max_positions - (factor - 1)
    return config.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(config: RopeConfig, plain: Float[Array, " half"]) -> Float[Array, " half"]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a linear blend between."""
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
    """YaRN (Peng et al. 2023, sections 3.2 and 3.4): interpolation by wavelength, and a temperature on the phases."""
    factor = config.get("factor")
    context = config.get("original_max_position_embeddings") or max_positions

    def dimension(rotations: float) -> float:
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.get("beta_fast") or 32), dimension(config.get("beta_slow") or 1)
    if config.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_temperature(config, factor)


def _yarn_temperature(config: RopeConfig, factor: float) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if (given := config.get("attention_factor")) is not None:
        return given
    mscale, mscale_all = config.get("mscale"), config.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)
