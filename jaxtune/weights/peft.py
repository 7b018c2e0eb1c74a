"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, read and
written strictly.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import ALL_LINEAR, AdapterConfig
from jaxtune.adapters.inject import EMBEDDING, HEAD, adapted, inject, module_names
from jaxtune.adapters.method import (
    AdaptedLayer,
    AdapterMethod,
    AdapterParam,
    method_named,
)
from jaxtune.adapters.tokens import TOKEN_ROWS
from jaxtune.core.distributed import fetch
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import check_directory, write_json
from jaxtune.core.sharding import sharding
from jaxtune.models.decoder import CausalLM
from jaxtune.weights import torch_files
from jaxtune.weights.adapter_config import adapter_config_json, read_adapter_config
from jaxtune.weights.mapping import model_tensors
from jaxtune.weights.safetensors_files import open_file
from jaxtune.weights.tensors import Index, LazyTensor, Tensors, in_memory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TORCH = "adapter_model.bin"
PREFIX = "base_model.model."
COPY = ".base_layer"
_MATRICES = (f"{EMBEDDING}.weight", f"{HEAD}.weight")

# PEFT reads a tensor under its name in the file and in its model, where the adapter has a name.
_ADAPTER_NAME = re.compile(r"\.default(\.weight)?$")
_MAGNITUDE = "lora_magnitude_vector"


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
        file: with its tensors.
        config: its method's numbers, its targets and the like.
        tensors: under PEFT's names, unread.

    """

    path: Path
    file: Path
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

    def on(self, base: Tensors) -> "Adapter":
        """Return the adapter with what its file lacks, made from the weights of its base.

        Args:
            base: by Hugging Face's names; without a head where that is tied to the embedding.

        Raises:
            UserError: a module on which that cannot be made.

        """
        method = method_named(self.config.method)
        if not method.needs_base(self.config):
            return self
        tensors = dict(self.tensors)
        for layer in self.layers():
            if layer.method is not method:
                continue
            weight = base.get(f"{layer.module}.weight")
            if weight is None or weight.quantized or "lora_A" not in layer.leaves:
                raise UserError(
                    f"{self.path / CONFIG}: init_lora_weights: the start of {layer.module} cannot "
                    "be taken out of a base that is quantized, of an embedding or of a tied head. "
                    "Convert the adapter in PEFT: model.save_pretrained(DIR, "
                    "path_initial_model_for_weight_conversion=START)."
                )
            whole = method.complete(self.config, layer.module, layer.leaves, weight.all())
            copy, rest = f"{PREFIX}{layer.module}{COPY}.weight", whole.pop("weight")
            if copy in tensors and np.allclose(tensors[copy].all(), rest, atol=1e-4):
                del tensors[copy]
            for leaf, values in whole.items():
                tensors[f"{PREFIX}{layer.module}.{method.leaves[leaf]}"] = in_memory(values)
        return replace(self, config=method.completed(self.config), tensors=tensors)

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
        UserError: no adapter there, another kind of adapter, an option that is not implemented, or
            tensors that disagree with the configuration.

    """
    path = Path(directory).expanduser()
    check_directory(path)
    weights = next((path / name for name in (WEIGHTS, TORCH) if (path / name).is_file()), None)
    if not (path / CONFIG).is_file() or weights is None:
        raise UserError(
            f"{directory} is not a PEFT adapter: it needs {CONFIG} and {WEIGHTS} (or {TORCH})."
        )
    config, raw = read_adapter_config(path / CONFIG)
    opened = (open_file if weights.suffix == ".safetensors" else torch_files.open_file)(weights)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in opened.items():
        plain = _ADAPTER_NAME.sub(r"\1", name)
        if plain.endswith(f"{_MAGNITUDE}.weight"):
            plain = plain.removesuffix(".weight")
        if plain in tensors:
            raise UserError(f"{weights} holds {plain} twice, once as {name}.")
        tensors[plain] = _finite(tensor, name, weights)
    if raw.get("ensure_weight_tying"):
        config = _with_tied_head(config, tensors)
    adapter = Adapter(path, weights, config, tensors)
    _check_sizes(adapter)
    return adapter


def _finite(tensor: LazyTensor, name: str, file: Path) -> LazyTensor:
    """Return the tensor, read with a check that its numbers are finite."""

    def read(index: Index) -> np.ndarray:
        values = tensor.read(index)
        if not np.isfinite(values).all():
            raise UserError(
                f"{file}: {name} holds NaN or infinity: the training that wrote it diverged, or "
                "the file is damaged. Use an earlier checkpoint."
            )
        return values

    return LazyTensor(tensor.shape, tensor.dtype, read, tensor.quantized)


def _with_tied_head(config: AdapterConfig, tensors: Tensors) -> AdapterConfig:
    """Return the adapter with what `ensure_weight_tying` put on a head that was tied to an adapted
    embedding: PEFT writes the head's tensors too, but not its name.
    """
    if f"{PREFIX}{HEAD}.weight" in tensors and not config.is_saved(HEAD):
        return replace(config, saved=(*config.saved, HEAD))
    adapts = f"{PREFIX}{HEAD}.lora_A.weight" in tensors
    if not adapts or config.is_target(HEAD, in_block=False):
        return config
    targets = config.targets
    wider = f"(?:{targets})|{HEAD}" if isinstance(targets, str) else (*targets, HEAD)
    return replace(config, targets=wider)


def _check_sizes(adapter: Adapter) -> None:
    """Check the sizes that the configuration gives against the file's, before anything is made of
    that size.

    Raises:
        UserError: the first tensor that disagrees.

    """
    for name, tensor in adapter.tensors.items():
        if (owner := _owner(adapter.config, name)) is None:
            continue
        method, module, leaf = owner
        sizes = method.shape_in_file(adapter.config, module, leaf)
        shape = dict(enumerate(tensor.shape))
        if any(shape.get(axis) != size for axis, size in sizes.items()):
            raise UserError(
                f"{adapter.file}: tensors of the wrong shape: {name} {list(tensor.shape)}, where "
                f"{CONFIG} gives {module} the rank {next(iter(sizes.values()))} (r, rank_pattern). "
                "The files do not belong together, or one of them was edited."
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
    base = model_tensors(nnx.state(model, nnx.Param), model.config)
    adapter = adapter.on(base)
    copies = _check(adapter, _shapes(model, adapter.config, mesh), base)
    config = adapter.config.with_dropout(dropout)
    inject(model, config, 0, mesh, all_targets=False)
    by_variable: dict[int, list[Entry]] = {}
    for entry in entries(model):
        by_variable.setdefault(id(entry.variable), []).append(entry)
    model.adapter = replace(model.adapter, copies=copies)
    for group in by_variable.values():
        variable = group[0].variable
        value = _filled(group, adapter.tensors)
        place = sharding(mesh, variable.get_metadata()["axes"], value.shape)
        variable.set_value(jax.device_put(value, place))


def _shapes(model: CausalLM, config: AdapterConfig, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Return what tensors the file of an adapter on this model has, without making any."""
    graph, state = nnx.split(model)
    shapes: dict[str, tuple[int, ...]] = {}

    def trace(state: nnx.State) -> None:
        adapted_model = nnx.merge(graph, state)
        inject(adapted_model, config, 0, mesh, all_targets=False)
        shapes.update((entry.name, entry.shape) for entry in entries(adapted_model))

    jax.eval_shape(trace, state)
    return shapes


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
    write_json(directory / CONFIG, adapter_config_json(config, base_name))


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


def _check(adapter: Adapter, shapes: dict[str, tuple[int, ...]], base: Tensors) -> tuple[str, ...]:
    """Check that every tensor of the adapter is there with its shape, and no other but copies of
    the base, and return the names of these.
    """
    tensors, problems, copies = adapter.tensors, [], []
    embedding, head = _MATRICES
    matrices = {embedding: base[embedding], head: base.get(head, base[embedding])}
    for name in [name for name in tensors if name not in shapes]:
        plain = name.removeprefix(PREFIX).replace(COPY, "")
        if plain in matrices:
            if not _is_equal(tensors[name], matrices[plain]):
                raise UserError(
                    f"{adapter.file}: {name} {list(tensors[name].shape)} differs from the base's "
                    f"{plain} {list(matrices[plain].shape)}. The adapter was trained on another "
                    "base, or with more or fewer tokens; give that base."
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
            f"{adapter.file}: the adapter does not fit this model. Tensors {'; '.join(problems)}."
        )
    return tuple(copies)


def _is_equal(tensor: LazyTensor, matrix: LazyTensor) -> bool:
    if tensor.shape != matrix.shape:
        return False
    return not (tensor.all().astype(np.float32) != matrix.all()).any()


def _base_tensor(model: CausalLM, name: str) -> np.ndarray:
    """Return a tensor of the base that the adapter's file repeats: the embedding or the head."""
    head, embedding = model.lm_head, model.model.embed_tokens
    module = embedding if head is None or "lm_head" not in name else head
    return np.ascontiguousarray(fetch(module.weight[: model.config.vocab_size]))
