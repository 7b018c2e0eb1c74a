"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, read and written strictly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.adapters.inject import ALL_LINEAR, adapted, inject
from jaxtune.adapters.lora import LoRAConfig, LoRALinear
from jaxtune.core.axes import sharding
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import read_json, write_json
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import CausalLM
from jaxtune.models.names import names_of
from jaxtune.weights.safetensors_files import open_file
from jaxtune.weights.tensors import Tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

# Keys of adapter_config.json that do not change what the adapter computes, and values that mean "not used".
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout", "r",
    "target_modules", "task_type", "peft_type", "use_rslora", "revision", "peft_version", "megatron_core", "runtime_config",
    "loftq_config", "qalora_group_size", "corda_config", "eva_config",
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        path: its directory.
        config: rank, scale and dropout.
        targets: as given, module names or `all-linear`.
        tensors: the factors under PEFT's names, unread.

    """

    path: Path
    config: LoRAConfig
    targets: list[str] | str
    tensors: Tensors


def open_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory, its factors unread.

    Raises:
        UserError: no adapter there, another kind of adapter, or an option that is not implemented.

    """
    path = Path(directory).expanduser()
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise UserError(f"{directory} is not a PEFT adapter: it needs {CONFIG} and {WEIGHTS}.")
    raw = read_json(path / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path / CONFIG}: peft_type {raw.get('peft_type')!r} is not supported; supported is LORA.")
    unused = (None, False, 0, [], {}, "none")
    if unknown := [key for key, value in raw.items() if key not in _NEUTRAL and value not in unused]:
        raise UserError(f"{path / CONFIG}: options that jaxtune does not implement: {listed(unknown)}.")
    config = LoRAConfig(raw["r"], float(raw["lora_alpha"]), float(raw.get("lora_dropout") or 0.0), bool(raw.get("use_rslora")))
    targets = raw.get("target_modules")
    if not isinstance(targets, list) and targets != ALL_LINEAR:
        raise UserError(f"{path / CONFIG}: target_modules must be a list of module names or '{ALL_LINEAR}', not {targets!r}.")
    return Adapter(path, config, targets, open_file(path / WEIGHTS))


def attach(model: CausalLM, adapter: Adapter, mesh: Mesh, dropout: float = 0.0) -> list[str]:
    """Put the adapter on `model`, in place, with its factors in float32.

    Args:
        model: the base.
        adapter: what `open_adapter` gave.
        mesh: where the factors go.
        dropout: rate in further training.

    Returns:
        The paths of the adapted layers.

    Raises:
        UserError: missing, unexpected or misshapen keys, by name.

    """
    numbers = adapter.config
    paths = inject(model, adapter.targets, LoRAConfig(numbers.rank, numbers.alpha, dropout, numbers.rslora), 0, mesh)
    layers = adapted(model)
    _check(adapter, layers, model.config)
    for path, layer in layers.items():
        for factor, variable in (("A", layer.lora_A), ("B", layer.lora_B)):
            stack = [adapter.tensors[name].all().astype(np.float32) for name in _names(path, factor, model.config)]
            place = sharding(mesh, variable.get_metadata()["axes"], variable.shape)
            variable.set_value(jax.device_put(np.stack(stack), place))
    return paths


def write_adapter(directory: Path, model: CausalLM, base_name: str) -> None:
    """Write the model's adapter into an existing directory, the factors in float32 and nothing else.

    Args:
        directory: where to; see `weights.export` for a verified export.
        model: the model with an adapter.
        base_name: what PEFT users load the base by.

    """
    from safetensors.numpy import save_file

    layers = adapted(model)
    tensors = {}
    for path, layer in layers.items():
        for factor, variable in (("A", layer.lora_A), ("B", layer.lora_B)):
            values = np.asarray(variable[...])
            tensors |= dict(zip(_names(path, factor, model.config), values, strict=True))
    numbers = next(iter(layers.values())).config
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"}
    )
    write_json(directory / CONFIG, _config(numbers, sorted({path.rpartition(".")[2] for path in layers}), base_name))


def _config(numbers: LoRAConfig, targets: list[str], base_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": numbers.rank,
        "lora_alpha": numbers.alpha,
        "lora_dropout": numbers.dropout,
        "use_rslora": numbers.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _names(path: str, factor: str, config: ModelConfig) -> list[str]:
    """PEFT's name of a factor in every layer of a stack."""
    return [f"{_PREFIX}{name}" for name in names_of((*path.split("."), f"lora_{factor}", "weight"), config)[1]]


def _check(adapter: Adapter, layers: dict[str, LoRALinear], config: ModelConfig) -> None:
    shapes = {}
    for path, layer in layers.items():
        for factor, variable in (("A", layer.lora_A), ("B", layer.lora_B)):
            shapes |= dict.fromkeys(_names(path, factor, config), variable.shape[1:])
    problems = []
    if missing := [name for name in shapes if name not in adapter.tensors]:
        problems.append(f"missing: {listed(missing)}")
    if unexpected := [name for name in adapter.tensors if name not in shapes]:
        problems.append(f"unexpected: {listed(unexpected)}")
    wrong = [name for name, shape in shapes.items() if name in adapter.tensors and adapter.tensors[name].shape != shape]
    if wrong:
        problems.append(
            "of the wrong shape: " + listed(f"{n} {list(adapter.tensors[n].shape)} instead of {list(shapes[n])}" for n in wrong)
        )
    if problems:
        raise UserError(f"{adapter.path / WEIGHTS}: the adapter does not fit this model. Tensors " + "; ".join(problems) + ".")
