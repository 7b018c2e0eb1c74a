"""The technique of a run: which weights are loaded how, and which leaves of the model train."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters import pissa
from jaxtune.adapters.config import LoRAConfig
from jaxtune.adapters.inject import adapted, inject
from jaxtune.config.schema import AdapterSection, Config
from jaxtune.core.errors import UserError
from jaxtune.core.sharding import sharding
from jaxtune.models.decoder import CausalLM
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import Adapter, attach, open_adapter
from jaxtune.weights.source import Source
from jaxtune.weights.vocabulary import ResizedSource


def selected(config: Config) -> tuple[str, ...]:
    """The entries of `trainable` where weights train; empty with an adapter."""
    if config.adapter.method != "none":
        return ()
    return (config.trainable,) if isinstance(config.trainable, str) else tuple(config.trainable)


def trained_model(
    config: Config, source: Source, adapter: Adapter | None, mesh: Mesh, *, shapes: bool = False
) -> CausalLM:
    """The model as training begins.

    Args:
        config: the resolved configuration.
        source: the base, grown by new tokens.
        adapter: the one to start from, if any.
        mesh: where it goes.
        shapes: only what its leaves would be and where.

    Raises:
        UserError: weights, targets or patterns that do not fit.

    """
    kind = config.model
    count = from_hf(source.config_json(), str(source.config_path)).num_layers
    layers = _layers(config.adapter, count)
    layer_boundaries = (
        ()
        if layers is None
        else tuple(at for at in range(1, count) if (at in layers) != (at - 1 in layers))
    )
    model = load_model(
        source,
        mesh,
        dtype=kind.dtype,
        compute=kind.compute_dtype,
        trainable=selected(config),
        layer_boundaries=layer_boundaries,
        shapes=shapes,
    )

    def adapt(model: CausalLM) -> None:
        inject(model, _lora(config.adapter, layers, model, source), config.train.seed, mesh)
        if config.adapter.init == "pissa":
            pissa.begin(model, mesh)

    if adapter is not None and not shapes:
        attach(model, adapter, mesh, config.adapter.dropout)
    elif config.adapter.method != "none":
        if shapes:
            return _shaped(model, adapt, mesh)
        adapt(model)
    return model


def _shaped(model: CausalLM, change: Callable[[CausalLM], None], mesh: Mesh) -> CausalLM:
    """A model of shapes after a change of it, new leaves laid out by their axes."""
    graph, state = nnx.split(model)
    kept, made = dict(nnx.to_flat_state(state)), []

    def changed(state: nnx.State) -> nnx.State:
        model = nnx.merge(graph, state)
        change(model)
        made.append(nnx.split(model)[0])
        return nnx.split(model)[1]

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
    return nnx.merge(made[0], nnx.from_flat_state(leaves))


def _lora(
    section: AdapterSection, layers: tuple[int, ...] | None, model: CausalLM, source: Source
) -> LoRAConfig:
    saved = tuple(section.modules_to_save)
    if section.train_tokens == "all":
        saved = tuple(dict.fromkeys((*saved, "embed_tokens", "lm_head")))
    tokens = {} if section.train_tokens == "all" else _token_rows(model, source)
    return LoRAConfig(
        section.rank,
        section.alpha,
        section.dropout,
        section.rslora,
        section.method == "dora",
        targets=section.targets if isinstance(section.targets, str) else tuple(section.targets),
        excluded=section.exclude if isinstance(section.exclude, str) else tuple(section.exclude),
        layers=layers,
        ranks=tuple(section.rank_pattern.items()),
        alphas=tuple(section.alpha_pattern.items()),
        saved=saved,
        bias=section.bias,
        tokens=tuple(tokens.items()),
        tokens_train=section.train_tokens == "new",
    )


def _layers(section: AdapterSection, count: int) -> tuple[int, ...] | None:
    found = section.layers
    if isinstance(found, str):
        return tuple(range(max(0, count - int(found.removeprefix("last:"))), count))
    if found is not None and (beyond := [number for number in found if number >= count]):
        raise UserError(
            f"adapter.layers: the model has the layers 0 to {count - 1}, not {beyond[0]}."
        )
    return None if found is None else tuple(found)


def _token_rows(model: CausalLM, source: Source) -> dict[str, tuple[int, ...]]:
    """The rows of new tokens that come with the adapter, by module."""
    if not isinstance(source, ResizedSource):
        return {}
    return dict.fromkeys(
        ("embed_tokens", "lm_head")[: 1 if model.lm_head is None else 2], source.new_ids
    )


def adopt_adapter(config: Config) -> Config:
    """The configuration with the numbers of the adapter it starts from, if it starts from one.

    Raises:
        UserError: the configuration says another rank, alpha, targets or the like than the adapter
            has.

    """
    if config.adapter.start is None:
        return config
    found = _adopted(open_adapter(config.adapter.start).config)
    for key, value in found.items():
        if key in config.adapter.model_fields_set and getattr(config.adapter, key) != value:
            raise UserError(
                f"adapter.{key} = {getattr(config.adapter, key)}, and adapter.init has {value}. "
                f"Remove adapter.{key}, or set it to that."
            )
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=found)})


def _adopted(adapter: LoRAConfig) -> dict[str, Any]:
    def plain(names: tuple[str, ...] | str) -> list[str] | str:
        return names if isinstance(names, str) else list(names)

    return {
        "method": "dora" if adapter.dora else "lora",
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "rslora": adapter.rslora,
        "targets": plain(adapter.targets),
        "exclude": plain(adapter.excluded),
        "layers": None if adapter.layers is None else list(adapter.layers),
        "rank_pattern": dict(adapter.ranks),
        "alpha_pattern": dict(adapter.alphas),
        "modules_to_save": list(adapter.saved),
        "bias": adapter.bias,
    }


def describe_training(config: Config, model: CausalLM, train: int, frozen: int, mesh: Mesh) -> str:
    """What trains, in a line for a person."""
    names = {"lora": "rsLoRA" if config.adapter.rslora else "LoRA", "dora": "DoRA"}
    if config.adapter.method == "none":
        what = "Training " + ", ".join(selected(config))
    else:
        start = ", from the principal singular vectors" if config.adapter.init == "pissa" else ""
        kinds = len({str(path[-1]) for path in adapted(model)})
        what = f"{names[config.adapter.method]} on {kinds} linear maps in each of {_adapted_layers(model)} layers{start}"
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
