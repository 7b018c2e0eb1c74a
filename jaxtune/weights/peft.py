"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, read and
written strictly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import ALL_LINEAR, LoRAConfig
from jaxtune.adapters.inject import adapted, inject, module_names
from jaxtune.adapters.lora import LoRAParam
from jaxtune.core.distributed import fetch
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import read_json, write_json
from jaxtune.core.sharding import sharding
from jaxtune.models.decoder import CausalLM
from jaxtune.weights.mapping import leaf_mappings
from jaxtune.weights.safetensors_files import open_file
from jaxtune.weights.tensors import Tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
COPY = ".base_layer"
TOKENS = ".token_adapter.trainable_tokens_delta"

# Keys of adapter_config.json that do not change what the adapter computes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "task_type",
    "peft_type", "revision",
    "peft_version", "megatron_core", "runtime_config", "loftq_config", "qalora_group_size",
    "corda_config", "eva_config",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
    "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
    "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        path: its directory.
        config: rank, scale, targets and the like.
        tensors: under PEFT's names, unread.

    """

    path: Path
    config: LoRAConfig
    tensors: Tensors


def open_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory, its tensors unread.

    Raises:
        UserError: no adapter there, another kind of adapter, or an option that is not implemented.

    """
    path = Path(directory).expanduser()
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise UserError(f"{directory} is not a PEFT adapter: it needs {CONFIG} and {WEIGHTS}.")
    raw, where = read_json(path / CONFIG), path / CONFIG
    if raw.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type {raw.get('peft_type')!r} is not supported; supported is LORA."
        )
    unused = (None, False, 0, [], {})
    if unknown := [
        key for key, value in raw.items() if key not in _NEUTRAL | _READ and value not in unused
    ]:
        raise UserError(f"{where}: options that jaxtune does not implement: {listed(unknown)}.")
    return Adapter(path, _config(raw, where), open_file(path / WEIGHTS))


def _config(raw: dict[str, Any], where: Path) -> LoRAConfig:
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    if not targets or not isinstance(targets, list | str):
        raise UserError(
            f"{where}: target_modules must be a list of module names, a regular expression or "
            f"'{ALL_LINEAR}', not {targets!r}."
        )
    if "r" not in raw or "lora_alpha" not in raw:
        raise UserError(f"{where}: r or lora_alpha is missing.")
    if (bias := raw.get("bias") or "none") not in ("none", "all", "lora_only"):
        raise UserError(
            f"{where}: bias {bias!r} is not supported; supported are none, all and lora_only."
        )
    return LoRAConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        dropout=float(raw.get("lora_dropout") or 0.0),
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        targets=_names(targets),
        excluded=_names(raw.get("exclude_modules")),
        layers=(layers,) if isinstance(layers, int) else (tuple(layers) if layers else None),
        layers_pattern=tuple(
            _names(
                [found]
                if isinstance(found := raw.get("layers_pattern"), str) and found
                else found or ()
            )
        ),
        ranks=tuple((raw.get("rank_pattern") or {}).items()),
        alphas=tuple((raw.get("alpha_pattern") or {}).items()),
        saved=tuple(_names(raw.get("modules_to_save"))),
        bias=bias,
        tokens=_tokens(raw.get("trainable_token_indices"), where),
    )


def _tokens(found: Any, where: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    rows = found if isinstance(found, dict) else {"embed_tokens": found} if found else {}
    if not all(
        isinstance(ids, list) and all(isinstance(token, int) for token in ids)
        for ids in rows.values()
    ):
        raise UserError(
            f"{where}: trainable_token_indices must be lists of token ids, not {found!r}."
        )
    return tuple((name, tuple(ids)) for name, ids in rows.items())


def _names(found: Any) -> tuple[str, ...] | str:
    return found if isinstance(found, str) else tuple(sorted(found or ()))


def attach(model: CausalLM, adapter: Adapter, mesh: Mesh, dropout: float = 0.0) -> None:
    """Put the adapter on `model`, in place, with its leaves in float32.

    Args:
        model: the base.
        adapter: what `open_adapter` gave.
        mesh: where the leaves go.
        dropout: rate in further training.

    Raises:
        UserError: missing, unexpected or misshapen keys, by name.

    """
    base = nnx.state(model, nnx.Param)  # before the adapter hides some of it
    inject(model, replace(adapter.config, dropout=dropout), 0, mesh)
    found = list(entries(model))
    copies = _check(adapter, {entry.name: entry.shape for entry in found}, model, base)
    model.adapter = replace(model.adapter, copies=copies)
    values: dict[int, np.ndarray] = {}
    for entry in found:
        value = values.setdefault(id(entry.variable), np.zeros(entry.variable.shape, np.float32))
        value[entry.index] = adapter.tensors[entry.name].all().astype(np.float32)
    for entry in found:
        if (value := values.pop(id(entry.variable), None)) is not None:
            place = sharding(mesh, entry.variable.get_metadata()["axes"], value.shape)
            entry.variable.set_value(jax.device_put(_kept(entry.variable, value, found), place))


def _kept(variable: LoRAParam, value: np.ndarray, found: list["Entry"]) -> np.ndarray:
    """The values of layers that the file has, and for a magnitude what it was in the others."""
    if not any(entry.magnitude for entry in found if entry.variable is variable):
        return value
    return np.where(value == 0, fetch(variable[...]), value)


def write_adapter(directory: Path, model: CausalLM, base_name: str) -> None:
    """Write the model's adapter into an existing directory, float32, its declared keys and nothing
    else.

    Args:
        directory: where to; see `weights.export` for a verified export.
        model: the model with an adapter.
        base_name: what PEFT users load the base by.

    """
    from safetensors.numpy import save_file

    tensors, whole = {}, {}
    for entry in entries(model):
        value = whole.setdefault(id(entry.variable), fetch(entry.variable[...]))
        tensors[entry.name] = np.ascontiguousarray(value[entry.index])
    if model.adapter.copies:
        tensors |= {name: _base_tensor(model, name) for name in model.adapter.copies}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    targets = model.adapter.targets
    if targets == ALL_LINEAR:
        targets = tuple({str(path[-1]) for path in adapted(model)})
    write_json(directory / CONFIG, _json(model.adapter, targets, base_name))


def _json(config: LoRAConfig, targets: tuple[str, ...] | str, base_name: str) -> dict[str, Any]:
    def written(names: tuple[Any, ...] | str | None) -> Any:
        return names if isinstance(names, str) else sorted(names or ()) or None

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": written(targets),
        "exclude_modules": written(config.excluded),
        "layers_to_transform": written(config.layers),
        "layers_pattern": written(config.layers_pattern),
        "rank_pattern": dict(config.ranks),
        "alpha_pattern": dict(config.alphas),
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": written(config.saved),
        "trainable_token_indices": {name: list(ids) for name, ids in config.tokens} or None,
        "inference_mode": True,
    }


@dataclass(frozen=True)
class Entry:
    """A tensor of the file and where it lies in the model: `variable[index]`."""

    name: str
    variable: LoRAParam
    index: Any
    magnitude: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return jax.eval_shape(lambda: self.variable[...][self.index]).shape


def entries(model: CausalLM) -> Iterator[Entry]:
    """The adapter's tensors, each layer's cut to its own rank."""
    layers = adapted(model)
    for path, variable in nnx.to_flat_state(nnx.state(model, LoRAParam)):
        *parents, leaf = path
        layer, names = layers.get(tuple(parents)), module_names(tuple(parents), model.config)
        stacked = len(names) > 1 or any(isinstance(part, int) for part in path)
        for number, name in enumerate(names):
            rank = layer.part.ranks[number] if layer else 0
            used = {
                "rank": rank,
                "vocab": model.config.vocab_size,
            }  # the rest of these axes is padding
            at: tuple[Any, ...] = (number,) if stacked else ()
            at += tuple(slice(used.get(axis)) for axis in variable.get_metadata()["axes"])
            if leaf == TOKENS.rpartition(".")[2]:
                yield Entry(f"{PREFIX}{name}{TOKENS}", variable, at)
            elif not str(leaf).startswith("lora_"):
                inner = COPY if layer and not model.adapter.is_saved(name) else ""
                yield Entry(f"{PREFIX}{name}{inner}.{leaf}", variable, at)
            elif rank:
                suffix = ".weight" if leaf in ("lora_A", "lora_B") else ""
                yield Entry(
                    f"{PREFIX}{name}.{leaf}{suffix}", variable, at, leaf == "lora_magnitude_vector"
                )


def _check(
    adapter: Adapter, shapes: dict[str, tuple[int, ...]], model: CausalLM, base: nnx.State
) -> tuple[str, ...]:
    """Every tensor of the adapter is there with its shape, and no other but copies of the base,
    which are returned by name.
    """
    found, problems, copies = adapter.tensors, [], []
    where = {
        name: leaf
        for leaf, row in zip(_leaves(base), leaf_mappings(base, model.config), strict=True)
        for name in row.names
    }
    where.setdefault("lm_head.weight", where["model.embed_tokens.weight"])
    for name in [name for name in found if name not in shapes]:
        plain = name.removeprefix(PREFIX).replace(COPY, "")
        leaf = where.get(plain)
        if leaf is not None and plain in ("model.embed_tokens.weight", "lm_head.weight"):
            leaf = leaf[: model.config.vocab_size]
            if (
                found[name].shape != leaf.shape
                or (found[name].all().astype(np.float32) != fetch(leaf).astype(np.float32)).any()
            ):
                raise UserError(
                    f"{adapter.path / WEIGHTS}: {name} differs from the base's {plain}. The "
                    "adapter was trained on another base, or with "
                    "more tokens; give that base."
                )
            copies.append(name)
    if missing := [name for name in shapes if name not in found]:
        problems.append(f"missing: {listed(missing)}")
    if unexpected := [name for name in found if name not in shapes and name not in copies]:
        problems.append(f"unexpected: {listed(unexpected)}")
    wrong = [name for name, shape in shapes.items() if name in found and found[name].shape != shape]
    if wrong:
        problems.append(
            "of the wrong shape: "
            + listed(f"{n} {list(found[n].shape)} instead of {list(shapes[n])}" for n in wrong)
        )
    if problems:
        raise UserError(
            f"{adapter.path / WEIGHTS}: the adapter does not fit this model. Tensors "
            + "; ".join(problems)
            + "."
        )
    return tuple(copies)


def _leaves(state: nnx.State) -> list[jax.Array]:
    return [variable.get_value() for _, variable in nnx.to_flat_state(state)]


def _base_tensor(model: CausalLM, name: str) -> np.ndarray:
    """A tensor of the base that the adapter's file repeats: the embedding or the head."""
    module = (
        model.lm_head
        if "lm_head" in name and model.lm_head is not None
        else model.model.embed_tokens
    )
    return np.ascontiguousarray(fetch(module.weight[: model.config.vocab_size]))
