"""The technique of a run: how the weights are loaded, and which leaves of the model train."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import AdapterConfig
from jaxtune.adapters.inject import adapted, inject
from jaxtune.adapters.method import COMMON_KEYS, AdapterMethod, method_named, method_of
from jaxtune.config.schema import AdapterSection, Config
from jaxtune.core.errors import UserError, listed
from jaxtune.core.sharding import sharding
from jaxtune.models.decoder import CausalLM
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import Adapter, attach, open_adapter
from jaxtune.weights.source import Source
from jaxtune.weights.vocabulary import ResizedSource

_WITH_TOKENS = ("embed_tokens", "lm_head")  # what has a row for every token


def selected(config: Config) -> tuple[str, ...]:
    """Return the entries of `trainable` where weights train; empty with an adapter."""
    if config.adapter.method != "none":
        return ()
    return (config.trainable,) if isinstance(config.trainable, str) else tuple(config.trainable)


def trained_model(
    config: Config, source: Source, adapter: Adapter | None, mesh: Mesh, *, shapes: bool = False
) -> CausalLM:
    """Load the model as training begins.

    Args:
        config: the resolved configuration.
        source: the base, with rows for new tokens.
        adapter: the one to start from, if any.
        mesh: where it goes.
        shapes: only what its leaves would be and where.

    Raises:
        UserError: weights, targets or patterns that do not fit.

    """
    count = from_hf(source.config_json(), str(source.config_path)).num_layers
    layers = _layers(config.adapter, count)
    model = load_model(
        source,
        mesh,
        dtype=config.model.dtype,
        compute=config.model.compute_dtype,
        trainable=selected(config),
        layer_boundaries=_boundaries(layers, count),
        shapes=shapes,
    )

    def adapt(model: CausalLM) -> None:
        adapter_config = _adapter_config(config.adapter, layers, model, source)
        # The targets of an adapter to start from are PEFT's to judge; see `weights.peft.attach`.
        strict = config.adapter.start is None
        inject(model, adapter_config, config.train.seed, mesh, all_targets=strict)

    if adapter is not None and not shapes:
        attach(model, adapter, mesh, config.adapter.dropout)
    elif config.adapter.method != "none":
        if shapes:
            return _shaped(model, adapt, mesh)
        adapt(model)
    return model


def _shaped(model: CausalLM, change: Callable[[CausalLM], None], mesh: Mesh) -> CausalLM:
    """Return a model of shapes after a change of it, new leaves laid out by their axes."""
    graph, state = nnx.split(model)
    kept, graphs = dict(nnx.to_flat_state(state)), []

    def changed(state: nnx.State) -> nnx.State:
        model = nnx.merge(graph, state)
        change(model)
        new_graph, new_state = nnx.split(model)
        graphs.append(new_graph)
        return new_state

    leaves = dict(nnx.to_flat_state(jax.eval_shape(changed, state)))
    for path, leaf in leaves.items():
        value, axes = leaf.get_value(), leaf.get_metadata().get("axes", ())
        if path in kept and isinstance(leaf, type(kept[path])):
            leaves[path] = kept[path]
        else:
            placed = jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=sharding(mesh, axes, value.shape)
            )
            leaves[path] = leaf.replace(placed)
    return nnx.merge(graphs[0], nnx.from_flat_state(leaves))


def _adapter_config(
    section: AdapterSection, layers: tuple[int, ...] | None, model: CausalLM, source: Source
) -> AdapterConfig:
    method, saved = method_of(section), tuple(section.modules_to_save)
    if section.train_tokens == "all":
        saved = tuple(dict.fromkeys((*saved, *_WITH_TOKENS)))
    tokens = {} if set(saved) >= set(_WITH_TOKENS) else _token_rows(model, source)
    return method.config(
        targets=section.targets if isinstance(section.targets, str) else tuple(section.targets),
        excluded=section.exclude if isinstance(section.exclude, str) else tuple(section.exclude),
        layers=layers,
        saved=saved,
        bias=section.bias,
        tokens=tuple(tokens.items()),
        tokens_train=section.train_tokens == "new",
        **method.from_section(section),
    )


def _boundaries(layers: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Return the layers at which adapted ones begin or end."""
    if layers is None:
        return ()
    return tuple(at for at in range(1, count) if (at in layers) != (at - 1 in layers))


def _layers(section: AdapterSection, count: int) -> tuple[int, ...] | None:
    layers = section.layers
    if isinstance(layers, str):
        return tuple(range(max(0, count - int(layers.removeprefix("last:"))), count))
    if layers is not None and (beyond := [number for number in layers if number >= count]):
        raise UserError(
            f"adapter.layers: the model has the layers 0 to {count - 1}, not {beyond[0]}."
        )
    return None if layers is None else tuple(layers)


def _token_rows(model: CausalLM, source: Source) -> dict[str, tuple[int, ...]]:
    """Return the rows of new tokens that come with the adapter, by module."""
    if not isinstance(source, ResizedSource):
        return {}
    return dict.fromkeys(_WITH_TOKENS[: 1 if model.lm_head is None else 2], source.new_ids)


def adopt_adapter(config: Config) -> Config:
    """Return the configuration with the numbers of the adapter it starts from, if it starts from
    one.

    Raises:
        UserError: the configuration says another rank, alpha, targets or the like than the adapter
            has, or sets keys that its method has no use for.

    """
    if config.adapter.start is not None:
        numbers = _section_of(open_adapter(config.adapter.start).config)
        for key, value in numbers.items():
            given = getattr(config.adapter, key)
            if key in config.adapter.model_fields_set and not _is_same(given, value):
                raise UserError(
                    f"adapter.{key} = {given}, and adapter.init has {value}. Remove "
                    f"adapter.{key}, or set it to that."
                )
        section = config.adapter.model_copy(update=numbers)
        config = config.model_copy(update={"adapter": section})
    if config.adapter.method != "none":
        _refuse_unused_keys(config, method_of(config.adapter))
    return config


def _is_same(given: Any, value: Any) -> bool:
    """Return whether two values of a key say the same; a list of names or numbers has no order."""
    if isinstance(given, list) and isinstance(value, list):
        return set(given) == set(value)
    return given == value


def _section_of(adapter: AdapterConfig) -> dict[str, Any]:
    """Return an adapter's numbers by the keys of the section `adapter`."""

    def as_list(names: tuple[str, ...] | str) -> list[str] | str:
        return names if isinstance(names, str) else list(names)

    return {
        **method_named(adapter.method).to_section(adapter),
        "targets": as_list(adapter.targets),
        "exclude": as_list(adapter.excluded),
        "modules_to_save": list(adapter.saved),
    }


def _refuse_unused_keys(config: Config, method: AdapterMethod) -> None:
    """Check that no key is set that means nothing to the adapter's method.

    Raises:
        UserError: some are.

    """
    unused = [
        f"adapter.{key}"
        for key, field in AdapterSection.model_fields.items()
        if key not in COMMON_KEYS | method.keys
        and getattr(config.adapter, key) != field.get_default(call_default_factory=True)
    ]
    if config.optimizer.lora_plus is not None and not method.low_rank:
        unused.append("optimizer.lora_plus")
    if config.optimizer.learning_rate == "auto" and not method.low_rank:
        unused.append("optimizer.learning_rate=auto")
    if unused:
        raise UserError(
            f"adapter.method={method.name} has no use for {listed(unused, 20)}. Remove "
            f"{'it' if len(unused) == 1 else 'them'}."
        )


def describe_training(config: Config, model: CausalLM, train: int, frozen: int, mesh: Mesh) -> str:
    """Return what trains, in a line for a person."""
    if config.adapter.method == "none":
        what = "Training " + ", ".join(selected(config))
    else:
        kinds = len({str(path[-1]) for path in adapted(model)})
        name = method_of(config.adapter).describe(config.adapter)
        what = f"{name} on {kinds} linear maps in each of {_adapted_layers(model)} layers"
    held = f", base in {config.model.dtype}" if config.model.dtype in ("nf4", "int8") else ""
    share = train / (train + frozen)
    device = jax.devices()[0].device_kind
    return (
        f"{what}: {train:,} parameters train ({share:.2%}), {frozen:,} frozen{held}; "
        f"{mesh.size} x {device}, {model.compute_dtype.name}"
    )


def _adapted_layers(model: CausalLM) -> int:
    layers = None if model.adapter is None else model.adapter.layers
    return model.config.num_layers if layers is None else len(layers)
