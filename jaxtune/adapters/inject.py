"""Which layers get an adapter, and putting it there."""

import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import ALL_LINEAR, LoRAConfig, fits
from jaxtune.adapters.lora import LoRAEmbedding, LoRALinear, LoRAParam, LoRASpec
from jaxtune.adapters.tokens import TokenEmbedding, TokenLinear
from jaxtune.core.errors import UserError, listed, nearest
from jaxtune.core.sharding import sharding
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Embedding, Linear
from jaxtune.models.names import names_of

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def module_names(path: tuple[Any, ...], config: ModelConfig) -> tuple[str, ...]:
    """Hugging Face's names of the modules in one of ours, one a layer where it is a stack."""
    return tuple(name.removesuffix(".weight") for name in names_of((*path, "weight"), config)[1])


def inject(model: CausalLM, config: LoRAConfig, seed: int, mesh: Mesh) -> None:
    """Put an adapter on the layers of `model` that `config` names, in place.

    A layer's draw depends on the seed, its path and its number, not on which other layers have an
    adapter.

    Raises:
        UserError: a target that matches nothing, with the candidates, or one that cannot be
            adapted.

    """
    _untie(model, config)
    chosen = _chosen(model, config)
    for path, part in chosen.items():
        module, key = (
            _at(model, path),
            jax.random.fold_in(jax.random.key(seed), zlib.crc32(part.name.encode())),
        )
        if isinstance(module, Embedding):
            if config.dora:
                raise UserError(
                    "DoRA on the embedding is not supported. Leave embed_tokens out of the targets."
                )
            new: nnx.Module = LoRAEmbedding(module, part, key)
        else:
            draw = partial(_draw, key, model.config, path)
            new = LoRALinear(module, part, draw, dora=config.dora)
        setattr(_at(model, path[:-1]), str(path[-1]), new)
    _train_whole(model, config)
    _own_rows(model, config)
    for _, variable in nnx.to_flat_state(nnx.state(model, LoRAParam)):
        place = sharding(mesh, variable.get_metadata()["axes"], variable.shape)
        variable.set_value(jax.device_put(variable[...], place))
    model.adapter = config


def partition_trainable(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`(graphdef, trainable, frozen)`: the leaves of an adapter, but for those that only come with
    it, or the weights that were loaded to be trained; and everything else.
    """
    graph, trainable, frozen = nnx.split(model, lambda _, leaf: _trains(leaf), ...)
    return graph, trainable, frozen


def _trains(leaf: Any) -> bool:
    return (
        leaf.trains
        if isinstance(leaf, LoRAParam)
        else bool(leaf.get_metadata().get("trained", False))
    )


def adapted(model: nnx.Module) -> dict[tuple[Any, ...], LoRALinear | LoRAEmbedding]:
    """The modules that have an adapter, by path."""
    return {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, LoRALinear | LoRAEmbedding)
    }


def _chosen(model: CausalLM, config: LoRAConfig) -> dict[tuple[Any, ...], LoRASpec]:
    candidates = {
        path: module_names(path, model.config)
        for path, module in sorted(nnx.iter_modules(model), key=lambda item: str(item[0]))
        if isinstance(module, Linear | Embedding)
    }
    everything = [name for names in candidates.values() for name in names]
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    for target in targets:
        wanted = target if isinstance(config.targets, str) else (target,)
        if config.targets != ALL_LINEAR and not any(fits(wanted, name) for name in everything):
            known = sorted({name.rpartition(".")[2] for name in everything})
            raise UserError(
                f"adapter.targets: '{target}' matches no module; there are {listed(known, 20)}, "
                f"or all-linear.{nearest(target, known)}"
            )
    chosen = {}
    for path, names in candidates.items():
        in_block = isinstance(_at(model, path), Linear) and path[0] != HEAD
        hits = [config.is_target(name, in_block) for name in names]
        if any(hits):
            ranks = tuple(
                config.rank_of(name) if hit else 0 for name, hit in zip(names, hits, strict=True)
            )
            scales = tuple(
                config.scale_of(name) if hit else 0.0 for name, hit in zip(names, hits, strict=True)
            )
            chosen[path] = LoRASpec(_generic(path), ranks, scales, config.dropout)
    if not chosen:
        raise UserError(
            f"adapter.targets: no module is left to adapt of {listed(targets)} after the choice "
            "of layers."
        )
    return chosen


def _generic(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path if not isinstance(part, int))


def _draw(
    key: jax.Array, config: ModelConfig, path: tuple[Any, ...], shape: tuple[int, ...], bound: float
) -> jax.Array:
    """A uniform factor: of a stack the rows of a draw for all layers of the model, however they
    are cut into stacks.
    """
    if len(shape) == 2:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    layers = config.segments[next(part for part in path if isinstance(part, int))]
    whole = jax.random.uniform(key, (config.num_layers, *shape[1:]), jnp.float32, -bound, bound)
    return whole[layers.start : layers.stop]


def _untie(model: CausalLM, config: LoRAConfig) -> None:
    """Give a tied head its own module where the adapter trains the head or the embedding alone,
    as PEFT does.
    """
    if model.lm_head is not None:
        return
    named = config.targets != ALL_LINEAR and fits(config.targets, HEAD)
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


def _train_whole(model: CausalLM, config: LoRAConfig) -> None:
    """Make the weights of saved modules, and the biases that train, leaves of the adapter."""
    for path, module in list(nnx.iter_modules(model)):
        for leaf in ("weight", "bias"):
            variable = getattr(module, leaf, None)
            if not isinstance(variable, nnx.Param):
                continue
            names = module_names(path, model.config)
            hits = {config.is_saved(name) for name in names}
            with_bias = config.bias == "all" or (
                config.bias == "lora_only" and isinstance(module, LoRALinear)
            )
            if hits == {True, False}:
                raise UserError(
                    f"modules_to_save: {listed(config.saved)} takes some layers of "
                    f"{_generic(path)} only; name all of them."
                )
            if (
                leaf == "bias"
                and config.bias == "lora_only"
                and isinstance(module, LoRALinear)
                and 0 in module.part.ranks
            ):
                raise UserError(
                    f"bias: lora_only where some layers of {_generic(path)} only are adapted is "
                    "not supported; use none or all."
                )
            if True in hits or (leaf == "bias" and with_bias):
                setattr(
                    module,
                    leaf,
                    LoRAParam(
                        variable[...].astype(jnp.float32), axes=variable.get_metadata()["axes"]
                    ),
                )


def _own_rows(model: CausalLM, config: LoRAConfig) -> None:
    """Give the tokens that have rows of their own in the adapter those rows, which begin at what
    they are.

    Raises:
        UserError: a module without rows of tokens, one that is adapted otherwise too, or an id that
            it does not have.

    """
    rows = dict(config.tokens)
    if unknown := [name for name in rows if not (fits((name,), EMBEDDING) or fits((name,), HEAD))]:
        raise UserError(
            f"trainable_token_indices: {listed(unknown)} has no tokens; embed_tokens and lm_head "
            "have."
        )
    for name, module in (("embed_tokens", model.model.embed_tokens), ("lm_head", model.lm_head)):
        ids = rows.get(name, rows.get(f"model.{name}"))
        if ids is None or (
            module is None and ids == rows.get("embed_tokens")
        ):  # a tied head has the embedding's
            continue
        untied = model.config.tie_embeddings and model.lm_head is not None
        plain = (
            module is not None
            and type(module) in (Embedding, Linear)
            and not isinstance(module.weight, LoRAParam)
        )
        if module is None or untied or not plain:
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
        if isinstance(module, Embedding):
            model.model.embed_tokens = TokenEmbedding(module, ids, trains=config.tokens_train)
        else:
            model.lm_head = TokenLinear(module, ids, trains=config.tokens_train)


def _at(model: nnx.Module, path: tuple[Any, ...]) -> Any:
    found: Any = model
    for part in path:
        found = found[part] if isinstance(part, int) else getattr(found, part)
    return found
