"""PiSSA: LoRA that begins as the principal part of the weight it lies on (Meng et al. 2024).

The paper subtracts that part from the base. Here the base stays as it is and the start is
subtracted in the forward pass, which computes the same and makes the first step exactly the base's;
the export is an ordinary adapter of twice the rank.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxtune.adapters.lora import LoRA, LoRAConfig, LoRALinear, LoRASpec
from jaxtune.adapters.method import AdaptedLayer, AdapterConstant, Site, register
from jaxtune.adapters.products import low_rank
from jaxtune.config.schema import AdapterSection
from jaxtune.core.distributed import fetch
from jaxtune.core.errors import UserError
from jaxtune.models.layers import Dropout, Linear, matmul

_OVERSAMPLING, _ITERATIONS = 32, 8


@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    """A low-rank adapter that begins as the principal part of its weights."""

    method: ClassVar[str] = "pissa"


class LoRAInit(AdapterConstant):
    """A factor as it was when training began, which is subtracted."""


class PiSSALinear(LoRALinear):
    """y = x W^T (+ b) + scale ((x A^T) B^T - (x A0^T) B0^T), A0 and B0 being A and B at first."""

    _fused = False

    def __init__(self, base: Linear, spec: LoRASpec, a: jax.Array, b: jax.Array) -> None:
        super().__init__(base, spec, a, b)
        self.start_A = LoRAInit(jnp.copy(a), axes=self.lora_A.get_metadata()["axes"])
        self.start_B = LoRAInit(jnp.copy(b), axes=self.lora_B.get_metadata()["axes"])

    def _update(
        self, dropped: Float[Array, "*batch in"], x: Float[Array, "*batch in"]
    ) -> Float[Array, "*batch out"]:
        update = super()._update(dropped, x)
        return update - low_rank(x, self.start_A[...], self._scaled(self.start_B[...]))

    def _head_factors(
        self, x: jax.Array, dropout: Dropout | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        low, b = super()._head_factors(x, dropout)
        start = matmul(x, self.start_A[...]), -self._scaled(self.start_B[...])
        return [*low, start[0]], [*b, start[1]]

    def exportable(self) -> LoRALinear:
        """Return the layer with ordinary factors of twice the rank: [A; A0] and [B, -B0]."""
        ranks, b0 = self.spec.ranks, self.start_B[...]
        a = _joined(self.lora_A[...], self.start_A[...], ranks)
        b = _joined(self.lora_B[...].swapaxes(-1, -2), -b0.swapaxes(-1, -2), ranks)
        spec = replace(self.spec, ranks=tuple(2 * rank for rank in ranks))
        return LoRALinear(self, spec, jnp.asarray(a), jnp.asarray(b.swapaxes(-1, -2)))


def _joined(trained: Any, start: Any, ranks: tuple[int, ...]) -> np.ndarray:
    """Return [A; A0] of every layer, its own ranks first."""
    trained, start = fetch((trained, start))
    whole = np.zeros((*trained.shape[:-2], 2 * trained.shape[-2], trained.shape[-1]), np.float32)
    flat, first, second = (part.reshape(-1, *part.shape[-2:]) for part in (whole, trained, start))
    for layer, rank in enumerate(ranks):
        flat[layer, :rank], flat[layer, rank : 2 * rank] = first[layer, :rank], second[layer, :rank]
    return whole


class PiSSA(LoRA):
    """Low-rank updates of linear layers, A = sqrt(S / scale) V^T and B = U sqrt(S / scale) at
    first, from the principal singular values and vectors of W.
    """

    name = "pissa"
    title = "PiSSA"
    config = PiSSAConfig
    wraps = (Linear,)
    starts = "lora"

    def describe(self, section: AdapterSection) -> str:
        """See AdapterMethod."""
        return f"{super().describe(section)} from the principal singular vectors"

    def wrap(self, base: Any, site: Site, config: LoRAConfig) -> AdaptedLayer:
        """See AdapterMethod."""
        spec = LoRASpec.of(site, config)
        return PiSSALinear(base, spec, *self.initial_factors(base, site, spec))

    def initial_factors(
        self, base: Linear, site: Site, spec: LoRASpec
    ) -> tuple[jax.Array, jax.Array]:
        """See LoRA."""
        self._check_ranks(base, site, spec)
        stack, weights = base.weight.shape[:-2], base.weight[...].astype(jnp.float32)
        scales = spec.scale(stack)[...].reshape(-1)
        layers = weights.reshape(-1, *weights.shape[-2:]), scales
        a, b = (
            factor.reshape(*stack, *factor.shape[1:])
            for factor in jax.lax.map(partial(_principal, max(spec.ranks)), layers)
        )
        a = jnp.where(spec.within(a.shape, -2), a, 0.0)
        b = jnp.where(spec.within(b.shape, -1), b, 0.0)
        if not isinstance(a, Tracer):  # which has no numbers to look at
            _check_start(b, site, spec)
        return a, b

    def _check_ranks(self, base: Linear, site: Site, spec: LoRASpec) -> None:
        """Check that each matrix has as many singular values as its rank.

        Raises:
            UserError: one has fewer.

        """
        smaller = min(base.weight.shape[-2:])
        for module, rank in zip(site.modules, spec.ranks, strict=True):
            if rank > smaller:
                raise UserError(
                    f"adapter.init=pissa: {module} has {smaller} singular values, fewer than its "
                    f"rank {rank}. Lower adapter.rank, give it a rank of its own "
                    f"(adapter.rank_pattern), or leave it out (adapter.exclude)."
                )

    def reads(self, raw: Any) -> bool:
        """See AdapterMethod: what is written is an ordinary adapter."""
        return False

    def exportable(self, config: LoRAConfig) -> LoRAConfig:
        """See AdapterMethod: twice the ranks with the same scales."""
        return LoRAConfig(**vars(config)).doubled()


def _check_start(b: jax.Array, site: Site, spec: LoRASpec) -> None:
    """Check that each matrix has a principal part to start from.

    Raises:
        UserError: one is zero, or holds NaN or infinity.

    """
    sizes = fetch(jnp.abs(b).max(axis=(-2, -1))).reshape(-1)
    for module, rank, size in zip(site.modules, spec.ranks, sizes, strict=True):
        if rank and not (np.isfinite(size) and size > 0):
            kind = "is zero" if size == 0 else "holds NaN or infinity"
            raise UserError(
                f"adapter.init=pissa: the weight of {module} {kind}, so it has no principal part "
                "to start from. Leave it out (adapter.exclude), or remove adapter.init."
            )


def _principal(rank: int, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return A and B of one matrix and scale, by subspace iteration (Halko et al. 2011, algorithm
    4.4); exact where all its directions fit.
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


register(PiSSA())
