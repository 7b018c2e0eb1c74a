"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, read and
written strictly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import ALL_LINEAR, AdapterConfig, names_from_peft, names_to_peft
from jaxtune.adapters.inject import adapted, inject, module_names
from jaxtune.adapters.method import (
    AdaptedLayer,
    AdapterMethod,
    AdapterParam,
    all_methods,
    method_named,
)
from jaxtune.adapters.tokens import TOKEN_ROWS
from jaxtune.core.distributed import fetch
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import check_directory, read_json, write_json
from jaxtune.core.sharding import sharding
from jaxtune.models.decoder import CausalLM
from jaxtune.weights.mapping import leaf_mappings
from jaxtune.weights.safetensors_files import open_file
from jaxtune.weights.tensors import LazyTensor, Tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
COPY = ".base_layer"

# Keys of adapter_config.json that are read of every method, or that change nothing.
_PEFT_KEYS = {
    "target_modules", "exclude_modules", "modules_to_save", "auto_mapping", "runtime_config",
    "base_model_name_or_path", "inference_mode", "task_type", "peft_type", "peft_version",
    "revision",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterLayer:
    """What an adapter on disk has for one module.

    Attributes:
        method: what the module is adapted by.
        module: Hugging Face's name of the module.
        leaves: the module's tensors, by the names of the method's leaves.

    """

    method: AdapterMethod[Any]
    module: str
    leaves: dict[str, np.ndarray]


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        path: its directory.
        config: its method's numbers, its targets and the like.
        tensors: under PEFT's names, unread.

    """

    path: Path
    config: AdapterConfig
    tensors: Tensors

    def layers(self) -> Iterator[AdapterLayer]:
        """Read what it has for each module that it is on."""
        layers: dict[tuple[str, str], AdapterLayer] = {}
        for name, tensor in self.tensors.items():
            if (owner := _owner(self.config, name)) is not None:
                method, module, leaf = owner
                layer = AdapterLayer(method, module, {})
                layers.setdefault((method.name, module), layer).leaves[leaf] = tensor.all()
        yield from layers.values()

    def whole_tensors(self) -> Tensors:
        """Return the tensors that stand in place of the base's, by Hugging Face's names: modules
        that are saved whole, and biases.
        """
        whole: dict[str, LazyTensor] = {}
        for name, tensor in self.tensors.items():
            plain = name.removeprefix(PREFIX)
            module, _, leaf = plain.rpartition(".")
            is_copy = leaf == "weight" and (COPY in plain or not self.config.is_saved(module))
            if not is_copy and _owner(self.config, name) is None:
                whole[plain.replace(COPY, "")] = tensor
        return whole


def _methods(config: AdapterConfig) -> tuple[AdapterMethod[Any], ...]:
    """Return the methods whose leaves an adapter may have."""
    method = method_named(config.method)
    return (method, TOKEN_ROWS) if method.token_rows else (method,)


def _owner(config: AdapterConfig, name: str) -> tuple[AdapterMethod[Any], str, str] | None:
    """Return `(method, module, leaf)` of a tensor of a file; None where it is a module's own."""
    plain = name.removeprefix(PREFIX)
    for method in _methods(config):
        for leaf, end in method.leaves.items():
            if plain.endswith(f".{end}"):
                return method, plain.removesuffix(f".{end}"), leaf
    return None


def open_adapter(directory: str | Path) -> Adapter:
    """Open the adapter in a directory, its tensors unread.

    Raises:
        UserError: no adapter there, another kind of adapter, or an option that is not implemented.

    """
    path = Path(directory).expanduser()
    check_directory(path)
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise UserError(f"{directory} is not a PEFT adapter: it needs {CONFIG} and {WEIGHTS}.")
    raw, where = read_json(path / CONFIG), path / CONFIG
    method = _method_of(raw, where)
    known = _PEFT_KEYS | method.peft_keys
    known |= TOKEN_ROWS.peft_keys if method.token_rows else frozenset()
    unused = (None, False, 0, [], {})
    if unknown := [key for key, value in raw.items() if key not in known and value not in unused]:
        raise UserError(f"{where}: options that jaxtune does not implement: {listed(unknown)}.")
    return Adapter(path, _config(method, raw, where), open_file(path / WEIGHTS))


def _method_of(raw: dict[str, Any], where: Path) -> AdapterMethod[Any]:
    kind, methods = raw.get("peft_type"), all_methods().values()
    method = next((each for each in methods if each.peft_type == kind and each.reads(raw)), None)
    if method is None:
        kinds = dict.fromkeys(method.peft_type for method in methods)
        raise UserError(
            f"{where}: peft_type {kind!r} is not supported; supported: {listed(kinds)}."
        )
    return method


def _config(method: AdapterMethod[Any], raw: dict[str, Any], where: Path) -> AdapterConfig:
    targets = raw.get("target_modules")
    if not targets or not isinstance(targets, list | str):
        raise UserError(
            f"{where}: target_modules must be a list of module names, a regular expression or "
            f"'{ALL_LINEAR}', not {targets!r}."
        )
    fields = method.from_peft(raw, str(where))
    if method.token_rows:
        fields |= TOKEN_ROWS.from_peft(raw, str(where))
    return method.config(
        targets=names_from_peft(targets),
        excluded=names_from_peft(raw.get("exclude_modules")),
        saved=tuple(names_from_peft(raw.get("modules_to_save"))),
        **fields,
    )


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
    inject(model, adapter.config.with_dropout(dropout), 0, mesh)
    by_variable: dict[int, list[Entry]] = {}
    for entry in entries(model):
        by_variable.setdefault(id(entry.variable), []).append(entry)
    shapes = {entry.name: entry.shape for group in by_variable.values() for entry in group}
    copies = _check(adapter, shapes, model, base)
    model.adapter = replace(model.adapter, copies=copies)
    for group in by_variable.values():
        variable = group[0].variable
        value = _filled(group, adapter.tensors)
        place = sharding(mesh, variable.get_metadata()["axes"], value.shape)
        variable.set_value(jax.device_put(value, place))


def _filled(group: list["Entry"], tensors: Tensors) -> np.ndarray:
    """Return a leaf with the numbers of the file; what the file has not, such as layers that are
    not adapted, is left as it is.
    """
    variable = group[0].variable
    complete = sum(math.prod(entry.shape) for entry in group) == variable.size
    value = np.empty(variable.shape, np.float32) if complete else np.array(fetch(variable[...]))
    for entry in group:
        value[entry.index] = tensors[entry.name].all().astype(np.float32)
    return value


def write_adapter(directory: Path, model: CausalLM, base_name: str) -> None:
    """Write the model's adapter into an existing directory, float32, its declared keys and nothing
    else.

    Args:
        directory: where to; see `weights.export` for a verified export.
        model: the model with an adapter.
        base_name: what PEFT users load the base by.

    """
    from safetensors.numpy import save_file

    tensors, leaves = {}, {}
    for entry in entries(model):
        leaf = leaves.setdefault(id(entry.variable), fetch(entry.variable[...]))
        tensors[entry.name] = np.ascontiguousarray(leaf[entry.index])
    tensors |= {name: _base_tensor(model, name) for name in model.adapter.copies}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = model.adapter
    if config.targets == ALL_LINEAR:
        config = replace(config, targets=tuple({str(path[-1]) for path in adapted(model)}))
    write_json(directory / CONFIG, _json(config, base_name))


def _json(config: AdapterConfig, base_name: str) -> dict[str, Any]:
    method = method_named(config.method)
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        **method.to_peft(config),
        "target_modules": names_to_peft(config.targets),
        **({"exclude_modules": names_to_peft(config.excluded)} if config.excluded else {}),
        "modules_to_save": names_to_peft(config.saved),
        **(TOKEN_ROWS.to_peft(config) if method.token_rows else {}),
        "inference_mode": True,
    }


@dataclass(frozen=True)
class Entry:
    """A tensor of the file and where it lies in the model: `variable[index]`."""

    name: str
    variable: AdapterParam
    index: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return jax.eval_shape(lambda: self.variable[...][self.index]).shape


def entries(model: CausalLM) -> Iterator[Entry]:
    """Yield the adapter's tensors, each layer's without padding."""
    layers = dict(nnx.iter_modules(model))
    methods, vocab_size = _methods(model.adapter), model.config.vocab_size
    for path, variable in nnx.to_flat_state(nnx.state(model, AdapterParam)):
        parents, leaf = tuple(path[:-1]), str(path[-1])
        layer, names = layers[parents], module_names(parents, model.config)
        stacked = len(names) > 1 or any(isinstance(part, int) for part in path)
        end = next((method.leaves[leaf] for method in methods if leaf in method.leaves), None)
        if end is None and leaf not in ("weight", "bias"):
            raise TypeError(f"{type(layer).__name__}.{leaf}: its method's `leaves` do not name it.")
        for number, name in enumerate(names):
            at: tuple[Any, ...] = (number,) if stacked else ()
            if end is None:
                is_inner = isinstance(layer, AdaptedLayer) and layer.by_target
                inner = COPY if is_inner and not model.adapter.is_saved(name) else ""
                axes = variable.get_metadata()["axes"]
                at += tuple(slice(vocab_size if axis == "vocab" else None) for axis in axes)
                yield Entry(f"{PREFIX}{name}{inner}.{leaf}", variable, at)
            elif isinstance(layer, AdaptedLayer) and layer.adapted[number]:
                at += layer.file_index(leaf, number, vocab_size)
                yield Entry(f"{PREFIX}{name}.{end}", variable, at)


def _check(
    adapter: Adapter, shapes: dict[str, tuple[int, ...]], model: CausalLM, base: nnx.State
) -> tuple[str, ...]:
    """Check that every tensor of the adapter is there with its shape, and no other but copies of
    the base, and return the names of these.
    """
    tensors, problems, copies = adapter.tensors, [], []
    where = {
        name: leaf
        for leaf, mapping in zip(_leaves(base), leaf_mappings(base, model.config), strict=True)
        for name in mapping.names
    }
    where.setdefault("lm_head.weight", where["model.embed_tokens.weight"])
    for name in [name for name in tensors if name not in shapes]:
        plain = name.removeprefix(PREFIX).replace(COPY, "")
        leaf = where.get(plain)
        if leaf is not None and plain in ("model.embed_tokens.weight", "lm_head.weight"):
            leaf = leaf[: model.config.vocab_size]
            if not _is_equal(tensors[name], leaf):
                raise UserError(
                    f"{adapter.path / WEIGHTS}: {name} differs from the base's {plain}. The "
                    "adapter was trained on another base, or with more tokens; give that base."
                )
            copies.append(name)
    if missing := [name for name in shapes if name not in tensors]:
        problems.append(f"missing: {listed(missing)}")
    if unexpected := [name for name in tensors if name not in shapes and name not in copies]:
        problems.append(f"unexpected: {listed(unexpected)}")
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        problems.append(f"of the wrong shape: {listed(wrong)}")
    if problems:
        raise UserError(
            f"{adapter.path / WEIGHTS}: the adapter does not fit this model. Tensors "
            f"{'; '.join(problems)}."
        )
    return tuple(copies)


def _is_equal(tensor: LazyTensor, leaf: jax.Array) -> bool:
    if tensor.shape != leaf.shape:
        return False
    return not (tensor.all().astype(np.float32) != fetch(leaf).astype(np.float32)).any()


def _leaves(state: nnx.State) -> list[jax.Array]:
    return [variable.get_value() for _, variable in nnx.to_flat_state(state)]


def _base_tensor(model: CausalLM, name: str) -> np.ndarray:
    """Return a tensor of the base that the adapter's file repeats: the embedding or the head."""
    head, embedding = model.lm_head, model.model.embed_tokens
    module = embedding if head is None or "lm_head" not in name else head
    return np.ascontiguousarray(fetch(module.weight[: model.config.vocab_size]))
