"""Which layers get an adapter, and putting it there."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import ALL_LINEAR, AdapterConfig, matches
from jaxtune.adapters.method import (
    AdaptedLayer,
    AdapterConstant,
    AdapterMethod,
    AdapterParam,
    Site,
    method_named,
)
from jaxtune.adapters.tokens import TOKEN_ROWS
from jaxtune.core.errors import UserError, listed, nearest
from jaxtune.core.sharding import sharding
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Embedding, Linear
from jaxtune.models.names import names_of

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def module_names(path: tuple[Any, ...], config: ModelConfig) -> tuple[str, ...]:
    """Return Hugging Face's names of the modules in one of ours, one a layer of a stack."""
    return tuple(name.removesuffix(".weight") for name in names_of((*path, "weight"), config)[1])


def inject(
    model: CausalLM, config: AdapterConfig, seed: int, mesh: Mesh, *, all_targets: bool = True
) -> None:
    """Put an adapter on the layers of `model` that `config` names, in place.

    A layer's draw depends on the seed, its path and its number, not on which other layers have an
    adapter.

    Args:
        model: the base.
        config: the adapter.
        seed: of the draws.
        mesh: where the leaves go.
        all_targets: whether each target must match a module; PEFT asks for one that does.

    Raises:
        UserError: a target that matches nothing, with the candidates, or one that cannot be
            adapted.

    """
    method = method_named(config.method)
    _untie(model, config)
    for path, adapted_layers in _targets(model, config, all_targets).items():
        base, site = _at(model, path), _site(model, path, adapted_layers, seed)
        if not isinstance(base, method.wraps):
            raise UserError(
                f"{method.title} on the embedding is not supported. Leave embed_tokens out of the "
                "targets."
            )
        layer = method.wrap(base, site, config)
        if path == (HEAD,) and getattr(type(layer), "as_head", None) is Linear.as_head:
            raise UserError(
                f"{method.title} on lm_head is not supported. Leave it out of the targets."
            )
        _replace(model, path, layer)
    _train_whole(model, config)
    _add_token_rows(model, config, method)
    for _, variable in nnx.to_flat_state(nnx.state(model, _is_of_adapter)):
        if axes := variable.get_metadata()["axes"]:
            place = sharding(mesh, axes, variable.shape)
            variable.set_value(jax.device_put(variable[...], place))
    model.adapter = config


def partition_trainable(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Return `(graphdef, trainable, frozen)`: the leaves that say that they train, which are those
    of an adapter or the weights that were loaded to be trained, and everything else.
    """
    graph, trainable, frozen = nnx.split(
        model, lambda _, leaf: bool(leaf.get_metadata().get("trained", False)), ...
    )
    return graph, trainable, frozen


def adapted(model: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """Return the layers that `adapter.targets` put an adapter on, by path."""
    return {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, AdaptedLayer) and module.by_target
    }


def exportable(model: CausalLM) -> CausalLM:
    """Return the model with an adapter that PEFT's files can express; a model whose adapter is one
    already, or that has none, is returned as it is.
    """
    if model.adapter is None:
        return model
    config = method_named(model.adapter.method).exportable(model.adapter)
    return _rewritten(model, config, lambda layer: layer.exportable())


def portable(model: CausalLM) -> CausalLM:
    """Return an exportable model with an adapter that programs other than PEFT read in the same
    way, where its method knows one; it computes the same but for rounding.
    """
    if model.adapter is None:
        return model
    modules = tuple(
        name
        for path, layer in adapted(model).items()
        for name, hit in zip(module_names(path, model.config), layer.adapted, strict=True)
        if hit
    )
    config = method_named(model.adapter.method).portable(model.adapter, modules)
    return _rewritten(model, config, lambda layer: layer.portable(config))


def _rewritten(
    model: CausalLM, config: AdapterConfig, change: Callable[[AdaptedLayer], AdaptedLayer]
) -> CausalLM:
    """Return the model with each adapted layer changed, or the model itself where `config` is its
    own.
    """
    if config is model.adapter:
        return model
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    for path, layer in adapted(model).items():
        _replace(model, path, change(layer))
    model.adapter = config
    return model


def _is_of_adapter(_: Any, variable: Any) -> bool:
    return isinstance(variable, AdapterParam | AdapterConstant)


def _targets(
    model: CausalLM, config: AdapterConfig, all_targets: bool
) -> dict[tuple[Any, ...], tuple[bool, ...]]:
    """Return the paths of the layers that get an adapter, and which of a stack do."""
    candidates = {
        path: module_names(path, model.config)
        for path, module in sorted(nnx.iter_modules(model), key=lambda item: str(item[0]))
        if isinstance(module, Linear | Embedding)
    }
    everything = [name for names in candidates.values() for name in names]
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    for target in targets if all_targets else ():
        pattern = target if isinstance(config.targets, str) else (target,)
        if config.targets != ALL_LINEAR and not any(matches(pattern, name) for name in everything):
            known = sorted({name.rpartition(".")[2] for name in everything})
            raise UserError(
                f"adapter.targets: '{target}' matches no module; there are {listed(known, 20)}, "
                f"or all-linear.{nearest(target, known)}"
            )
    hits = {}
    for path, names in candidates.items():
        in_block = isinstance(_at(model, path), Linear) and path[0] != HEAD
        hits[path] = tuple(config.is_target(name, in_block) for name in names)
    hits = {path: layers for path, layers in hits.items() if any(layers)}
    if not hits:
        raise UserError(
            f"adapter.targets: no module is left to adapt of {listed(targets)} after the choice "
            "of layers and exclusions."
        )
    return hits


def _site(
    model: CausalLM, path: tuple[Any, ...], adapted_layers: tuple[bool, ...], seed: int
) -> Site:
    name = _generic(path)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    uniform = partial(_draw, key, model.config, path)
    return Site(name, module_names(path, model.config), adapted_layers, key, uniform)


def _generic(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path if not isinstance(part, int))


def _draw(
    key: jax.Array, config: ModelConfig, path: tuple[Any, ...], shape: tuple[int, ...], bound: float
) -> jax.Array:
    """Draw a uniform factor: of a stack the rows of a draw for all layers of the model, however
    these are divided into stacks.
    """
    if len(shape) == 2:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    layers = config.segments[next(part for part in path if isinstance(part, int))]
    whole = jax.random.uniform(key, (config.num_layers, *shape[1:]), jnp.float32, -bound, bound)
    return whole[layers.start : layers.stop]


def _untie(model: CausalLM, config: AdapterConfig) -> None:
    """Give a tied head its own module where the adapter trains the head or the embedding alone,
    as PEFT does.
    """
    if model.lm_head is not None:
        return
    named = config.targets != ALL_LINEAR and matches(config.targets, HEAD)
    if named or config.is_saved(HEAD) or config.is_saved(EMBEDDING):
        table = model.model.embed_tokens.weight
        with nnx.use_eager_sharding(False):
            head = nnx.eval_shape(
                lambda: Linear(
                    1, 1, ("vocab", "embed"), bias=False, dtype=table[...].dtype, rngs=nnx.Rngs(0)
                )
            )
        head.weight = nnx.Param(table[...], axes=table.get_metadata()["axes"])
        model.lm_head = head


def _train_whole(model: CausalLM, config: AdapterConfig) -> None:
    """Make the weights of saved modules, and the biases that train, leaves of the adapter."""
    for path, module in list(nnx.iter_modules(model)):
        layers = module.adapted if isinstance(module, AdaptedLayer) else ()
        for leaf in ("weight", "bias"):
            variable = getattr(module, leaf, None)
            if not isinstance(variable, nnx.Param):
                continue
            names = module_names(path, model.config)
            saved = {config.is_saved(name) for name in names}
            if saved == {True, False}:
                raise UserError(
                    f"modules_to_save: {listed(config.saved)} takes some layers of "
                    f"{_generic(path)} only; name all of them."
                )
            of_adapted = leaf == "bias" and config.bias == "lora_only" and bool(layers)
            if of_adapted and not all(layers):
                raise UserError(
                    f"bias: lora_only where some layers of {_generic(path)} only are adapted is "
                    "not supported; use none or all."
                )
            if True in saved or of_adapted or (leaf == "bias" and config.bias == "all"):
                axes = variable.get_metadata()["axes"]
                value = variable[...].astype(jnp.float32)
                setattr(module, leaf, AdapterParam(value, axes=axes, lora_plus=len(axes) == 1))


def _add_token_rows(model: CausalLM, config: AdapterConfig, method: AdapterMethod) -> None:
    """Give the tokens that have rows of their own in the adapter those rows, which begin at what
    they are.

    Raises:
        UserError: a module without rows of tokens, one that is adapted otherwise too, an id that
            it does not have, or a method that has no place for such rows.

    """
    rows = dict(config.tokens)
    if rows and not method.token_rows:
        raise UserError(
            f"{method.title} has no place for rows of single tokens. To train new tokens set "
            "adapter.modules_to_save=[embed_tokens, lm_head]."
        )
    unknown = [name for name in rows if not (matches((name,), EMBEDDING) or matches((name,), HEAD))]
    if unknown:
        raise UserError(
            f"trainable_token_indices: {listed(unknown)} has no tokens; embed_tokens and lm_head "
            "have."
        )
    for name, path in (("embed_tokens", ("model", "embed_tokens")), ("lm_head", (HEAD,))):
        module, ids = _at(model, path), rows.get(name, rows.get(f"model.{name}"))
        tied = module is None and ids == rows.get("embed_tokens")  # it has the embedding's
        if ids is None or tied:
            continue
        _check_token_rows(model, name, module, ids)
        _replace(model, path, TOKEN_ROWS.wrap(module, _site(model, path, (True,), 0), config))


def _check_token_rows(model: CausalLM, name: str, module: Any, ids: tuple[int, ...]) -> None:
    untied = model.config.tie_embeddings and model.lm_head is not None
    plain = type(module) in (Embedding, Linear) and not isinstance(module.weight, AdapterParam)
    if untied or not plain:
        raise UserError(
            f"{name}: rows of single tokens and another adapter on the same or a tied module "
            "are not supported."
        )
    if not ids or min(ids) < 0 or max(ids) >= model.config.vocab_size:
        tokens = listed(map(str, ids))
        raise UserError(
            f"trainable_token_indices: {name} has the tokens 0 to "
            f"{model.config.vocab_size - 1}, not all of {tokens}."
        )


def _at(model: nnx.Module, path: tuple[Any, ...]) -> Any:
    module: Any = model
    for part in path:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


def _replace(model: nnx.Module, path: tuple[Any, ...], module: nnx.Module) -> None:
    setattr(_at(model, path[:-1]), str(path[-1]), module)
