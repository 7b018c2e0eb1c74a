"""The rotary embedding in GGUF: metadata and divisors of frequencies, read and written as
llama.cpp computes with them.
"""

from typing import Any

import numpy as np

from jaxtune.core.errors import UserError
from jaxtune.models.config import ModelConfig, RopeConfig
from jaxtune.models.families.from_hf import from_hf
from jaxtune.models.rope import attention_factor, yarn_temperature
from jaxtune.weights.formats.gguf.file import GGUF

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Keys of config.json that describe the rotary embedding, in both dialects.
_HF_KEYS = {
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip
_LENGTH = "original_max_position_embeddings"
# What llama.cpp takes for every family here, whatever the file says.
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def short(value: float) -> float:
    """Return a float32 as the shortest decimal that rounds to it, such as 1e-05 instead of
    9.999999747378752e-06.
    """
    return float(str(np.float32(value)))


def read_rope(file: GGUF, metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json for the rotary embedding.

    Args:
        file: the file.
        metadata: that of its architecture, without the prefix.
        config: what is known of its config.json.

    Raises:
        UserError: a kind of scaling that is not supported.

    """
    theta = short(metadata.get("rope.freq_base", 10000.0))
    size = metadata.get("rope.dimension_count", config["head_dim"])
    options = _scaling(file, metadata, size, theta)
    if config["model_type"] == "gemma3_text":
        local = short(metadata.get("rope.freq_base_swa", 10000.0))
        return {"rope_theta": theta, "rope_local_base_freq": local, "rope_scaling": options}
    if config["model_type"] == "phi3":
        share = size / config["head_dim"]
        context = metadata.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        return {
            "rope_parameters": {"rope_theta": theta, "partial_rotary_factor": share, **options},
            _LENGTH: context,
        }
    if size != config["head_dim"]:
        raise UserError(
            f"{file.path}: rotary embeddings over a part of a head are not supported for "
            f"{config['model_type']}."
        )
    return {"rope_parameters": {"rope_theta": theta, **options}}


def _scaling(file: GGUF, metadata: dict[str, Any], size: int, theta: float) -> dict[str, Any]:
    if "rope_factors_long.weight" in file.tensors or "rope_factors_short.weight" in file.tensors:
        return _longrope(file, metadata, size)
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, size, theta)
    # llama.cpp's own assumptions: a factor alone is linear, and has an older name.
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": short(factor)}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": short(factor), **_yarn_options(metadata, factor)}
    raise UserError(f"{file.path}: rope scaling {kind!r} is not supported.")


def _yarn_options(metadata: dict[str, Any], factor: float) -> dict[str, Any]:
    options = {}
    if length := metadata.get("rope.scaling.original_context_length"):
        options[_LENGTH] = length
    # llama.cpp multiplies its own temperature by the first; its converter writes Hugging Face's
    # attention_factor as the second.
    if (scale := metadata.get("rope.scaling.attn_factor")) is not None:
        options["attention_factor"] = short(scale * yarn_temperature(factor))
    elif (scale := metadata.get("rope.scaling.yarn_attn_factor")) is not None:
        options["attention_factor"] = short(scale)
    for name in _YARN_BETAS:
        if (beta := metadata.get(f"rope.scaling.yarn_{name}")) is not None:
            options[name] = short(beta)
    return options


def _longrope(file: GGUF, metadata: dict[str, Any], size: int) -> dict[str, Any]:
    options: dict[str, Any] = {"rope_type": "longrope"}
    for name in ("long", "short"):
        options[f"{name}_factor"] = [
            short(x) for x in _divisors(file, f"rope_factors_{name}.weight", size).tolist()
        ]
    if length := metadata.get("rope.scaling.original_context_length"):
        options[_LENGTH] = length
    if (scale := metadata.get("rope.scaling.attn_factor")) is not None:
        options["attention_factor"] = short(scale)
    return options


def _divisors(file: GGUF, name: str, size: int) -> np.ndarray:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.shape != (size // 2,):
        shape = "missing" if tensor is None else f"of the shape {list(tensor.shape)}"
        raise UserError(
            f"{file.path}: the tensor {name} is {shape}; {size // 2} divisors are needed, one for "
            "every two dimensions that are rotated."
        )
    return tensor.all().astype(np.float64)


def _llama3(file: GGUF, size: int, theta: float) -> dict[str, Any]:
    """Recover Llama 3's scaling from the divisor of every frequency, which is all that the format
    keeps of it.
    """
    divisors = _divisors(file, "rope_freqs.weight", size)
    plain = theta ** (-np.arange(0, size, 2) / size)
    factor = short(float(divisors.max()))
    for context in (8192, *(1 << power for power in range(20))):
        blend = np.clip((context * plain / (2 * np.pi) - 1.0) / 3.0, 0, 1)
        expected = 1 / ((1 - blend) / factor + blend)
        if np.allclose(divisors, expected, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                _LENGTH: context,
            }
    raise UserError(
        f"{file.path}: rope_freqs.weight is not Llama 3's frequency scaling (from 1 to 4 turns), "
        "the only one that is supported."
    )


def as_read_back(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a `config.json` that describes the same model with what a file keeps of YaRN and
    LongRoPE: the attention factor as a number, not what it is computed from.
    """
    config = from_hf(raw, where)
    rope = config.ropes[0]
    if rope.kind not in ("yarn", "longrope"):
        return raw
    options = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in rope.options
        if key not in ("mscale", "mscale_all_dim", "truncate")
        and not (key == "factor" and rope.kind == "longrope")
    }
    length = rope.get(_LENGTH) or config.max_positions
    options |= {_LENGTH: length, "attention_factor": attention_factor(rope, config.max_positions)}
    base = {"rope_type": rope.kind, "rope_theta": rope.theta, "partial_rotary_factor": rope.partial}
    kept = {key: value for key, value in raw.items() if key not in _HF_KEYS}
    return kept | {"rope_parameters": base | options, _LENGTH: length}


def rope_metadata(config: ModelConfig) -> dict[str, Any]:
    """Return the metadata of the rotary embedding, without the architecture's prefix."""
    rope = config.ropes[0]
    metadata: dict[str, Any] = {
        "rope.freq_base": rope.theta,
        "rope.dimension_count": int(config.head_dim * rope.partial),
    }
    if len(config.ropes) > 1:
        metadata["rope.freq_base_swa"] = config.ropes[1].theta
    if rope.kind in ("linear", "yarn", "longrope"):
        metadata["rope.scaling.type"] = rope.kind
    if rope.kind in ("linear", "yarn"):
        metadata["rope.scaling.factor"] = float(rope.get("factor"))
    if rope.kind in ("yarn", "longrope"):
        scale = attention_factor(rope, config.max_positions)
        if rope.kind == "yarn":
            scale /= yarn_temperature(rope.get("factor"))
        metadata["rope.scaling.attn_factor"] = float(scale)
        length = rope.get(_LENGTH) or config.max_positions
        metadata["rope.scaling.original_context_length"] = length
    elif length := rope.get(_LENGTH) or config.raw.get(_LENGTH):
        metadata["rope.scaling.original_context_length"] = length
    for name in _YARN_BETAS:
        if (beta := rope.get(name)) is not None:
            metadata[f"rope.scaling.yarn_{name}"] = float(beta)
    return metadata


def rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the frequency divisors, which the format keeps as tensors."""
    rope = config.ropes[0]
    if rope.kind == "longrope":
        return {
            f"rope_factors_{size}.weight": np.asarray(rope.get(f"{size}_factor"), np.float32)
            for size in ("long", "short")
        }
    if rope.kind == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, config.head_dim)}
    return {}


def _llama3_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    plain = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    turns = rope.get(_LENGTH) * plain / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / rope.get("factor") + blend)).astype(np.float32)


def unexpressed_options(rope: RopeConfig) -> list[str]:
    """Return the options of a rotary embedding that llama.cpp does not read."""
    fixed = {"truncate": True, **_YARN_BETAS} if rope.kind == "yarn" else {}
    return [
        f"{key} {rope.get(key)}"
        for key, value in fixed.items()
        if rope.get(key) is not None and rope.get(key) != value
    ]
