"""PiSSA: an adapter that begins as the principal part of the weight it lies on (Meng et al. 2024).

The paper subtracts that part from the base. Here the base stays as it is and the start is
subtracted in the forward pass, which computes the same and makes the first step exactly the base's;
the export is an ordinary adapter of twice the rank.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.config import LoRAConfig
from jaxtune.adapters.inject import adapted
from jaxtune.adapters.lora import LoRAInit, LoRALinear, LoRAParam
from jaxtune.core.distributed import fetch
from jaxtune.core.errors import UserError
from jaxtune.core.sharding import sharding
from jaxtune.models.decoder import CausalLM

_OVERSAMPLING, _ITERATIONS = 32, 8


def begin(model: CausalLM, mesh: Mesh) -> None:
    """Set the factors of the model's adapter to the principal singular vectors, A = sqrt(S / scale)
    V^T and B = U sqrt(S / scale).

    Raises:
        UserError: an adapter on the embedding.

    """
    for module in adapted(model).values():
        if not isinstance(module, LoRALinear):
            raise UserError(
                "adapter.init=pissa on the embedding is not supported. Leave embed_tokens out of "
                "the targets."
            )
        rank, stack = max(module.part.ranks), module.weight.shape[:-2]
        weights = module.weight[...].astype(jnp.float32)
        flat = weights.reshape(-1, *weights.shape[-2:]), module.scale[...].reshape(-1)
        factors = jax.lax.map(partial(_principal, rank), flat)
        for variable, start, value, axis in zip(
            (module.lora_A, module.lora_B), ("start_A", "start_B"), factors, (-2, -1), strict=True
        ):
            shaped = value.reshape(*stack, *value.shape[1:])
            shaped = jnp.where(module.part.within(shaped.shape, axis), shaped, 0.0)
            axes = variable.get_metadata()["axes"]
            placed = jax.device_put(shaped, sharding(mesh, axes, shaped.shape))
            variable.set_value(placed)
            setattr(module, start, nnx.data(LoRAInit(jnp.copy(placed), axes=axes)))


def _principal(rank: int, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`(A, B)` of one matrix, by subspace iteration (Halko et al. 2011, algorithm 4.4); exact
    where all its directions fit.
    """
    weight, scale = layer
    size = min(2 * rank + _OVERSAMPLING, *weight.shape)
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    basis = jnp.linalg.qr(
        product(weight, jax.random.normal(jax.random.key(0), (weight.shape[1], size)))
    )[0]
    for _ in range(_ITERATIONS):
        basis = jnp.linalg.qr(product(weight, jnp.linalg.qr(product(weight.T, basis))[0]))[0]
    left, values, right = jnp.linalg.svd(product(basis.T, weight), full_matrices=False)
    root = jnp.sqrt(values[:rank] / jnp.where(scale == 0, 1.0, scale))
    return root[:, None] * right[:rank], product(basis, left[:, :rank]) * root


def as_lora(model: CausalLM) -> CausalLM:
    """The same model with ordinary factors of twice the rank: [A; A0] and [B, -B0]. A model that
    did not begin so is returned as it is.
    """
    if not any(getattr(module, "start_A", None) is not None for module in adapted(model).values()):
        return model
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    for module in adapted(model).values():
        assert isinstance(module, LoRALinear)
        assert module.start_A is not None
        assert module.start_B is not None
        ranks = module.part.ranks
        a = _joined(module.lora_A[...], module.start_A[...], ranks)
        b = _joined(
            module.lora_B[...].swapaxes(-1, -2), -module.start_B[...].swapaxes(-1, -2), ranks
        ).swapaxes(-1, -2)
        module.lora_A = LoRAParam(jnp.asarray(a), axes=module.lora_A.get_metadata()["axes"])
        module.lora_B = LoRAParam(jnp.asarray(b), axes=module.lora_B.get_metadata()["axes"])
        module.part = replace(module.part, ranks=tuple(2 * rank for rank in ranks))
        module.start_A = module.start_B = None
    model.adapter = _doubled(model.adapter)
    return model


def _joined(trained: Any, start: Any, ranks: tuple[int, ...]) -> np.ndarray:
    """[A; A0] of every layer, its own ranks first."""
    trained, start = fetch((trained, start))
    whole = np.zeros((*trained.shape[:-2], 2 * trained.shape[-2], trained.shape[-1]), np.float32)
    flat, first, second = (part.reshape(-1, *part.shape[-2:]) for part in (whole, trained, start))
    for layer, rank in enumerate(ranks):
        flat[layer, :rank], flat[layer, rank : 2 * rank] = first[layer, :rank], second[layer, :rank]
    return whole


def _doubled(config: LoRAConfig) -> LoRAConfig:
    """Twice the ranks with the same scales."""
    factor = 2.0**0.5 if config.rslora else 2.0
    return replace(
        config,
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        ranks=tuple((name, 2 * rank) for name, rank in config.ranks),
        alphas=tuple((name, factor * alpha) for name, alpha in config.alphas),
    )
