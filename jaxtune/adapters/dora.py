"""DoRA: LoRA whose adapted rows are brought to trained lengths (Liu et al. 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtune.adapters.lora import LoRA, LoRAConfig, LoRALinear, LoRASpec
from jaxtune.adapters.method import AdaptedLayer, AdapterParam, RowMap, Site, register
from jaxtune.config.schema import AdapterSection
from jaxtune.models.layers import Dropout, Linear


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """A low-rank adapter with magnitudes."""

    method: ClassVar[str] = "dora"


class DoRALinear(LoRALinear):
    """Rows of W + scale B A brought to the lengths m (eq. 5); m [out], float32.

    A row's own length is no part of the gradient, as in section 4.3 and in PEFT. The lengths begin
    as those of W.

    A row of zeros has no direction: W + scale B A has to have one before it has a length. There B
    begins with a one, which the length of zero hides, so that PEFT can divide by it too.
    """

    _fused = False

    def __init__(self, base: Linear, spec: LoRASpec, a: jax.Array, b: jax.Array) -> None:
        lengths = jnp.linalg.norm(base.weight[...].astype(jnp.float32), axis=-1)
        first = jax.lax.broadcasted_iota(jnp.int32, b.shape, b.ndim - 1) == 0
        directed = (lengths[..., None] == 0) & first & spec.within(b.shape, -1)
        super().__init__(base, spec, a, jnp.where(directed, 1.0, b))
        axes = base.weight.get_metadata()["axes"]
        self.lora_magnitude_vector = AdapterParam(lengths, axes=axes[:1], lora_plus=True)

    def _composed(self, x: Float[Array, "*batch in"], dropped: Float[Array, "*batch in"]) -> Any:
        y, update = self.times_weight(x), self._update(dropped, x)
        stretch = self._stretch().astype(y.dtype)
        base = y if dropped is x else self.times_weight(dropped)
        return y + (stretch - 1) * base + stretch * update

    def as_head(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """See LoRALinear."""
        hidden, wide = super().as_head(x, dropout)
        return hidden, wide * self._stretch().astype(x.dtype)[:, None]

    def _stretch(self) -> Float[Array, " out"]:
        """Return by how much each row is stretched; 1 where the layer has no adapter, and where a
        row is zero, which no length can stretch.
        """
        scale = self.scale[...]
        update = scale * jnp.matmul(
            self.lora_B[...], self.lora_A[...], precision=jax.lax.Precision.HIGHEST
        )
        length = jnp.linalg.norm(self.weight[...].astype(jnp.float32) + update, axis=-1)
        length = jax.lax.stop_gradient(length)
        stretched = (scale != 0) & (length > 0)
        lengths = self.lora_magnitude_vector[...] / jnp.where(stretched, length, 1.0)
        return jnp.where(stretched, lengths, 1.0)


class DoRA(LoRA):
    """Low-rank updates and magnitudes of linear layers."""

    name = "dora"
    title = "DoRA"
    config = DoRAConfig
    leaves: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    wraps = (Linear,)

    def describe(self, section: AdapterSection) -> str:
        """See AdapterMethod."""
        return self.title

    def wrap(self, base: Any, site: Site, config: LoRAConfig) -> AdaptedLayer:
        """See AdapterMethod."""
        spec = LoRASpec.of(site, config)
        return DoRALinear(base, spec, *self.initial_factors(base, site, spec))

    def merge(
        self, config: LoRAConfig, module: str, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, RowMap]:
        """See AdapterMethod."""
        update = super().merge(config, module, tensors)["weight"]
        lengths = tensors["lora_magnitude_vector"].astype(np.float32)

        def stretched(block: np.ndarray, rows: slice) -> np.ndarray:
            block = update(block, rows)
            norms = np.linalg.norm(block, axis=1)
            return block * (lengths[rows] / np.where(norms > 0, norms, 1.0))[:, None]

        return {"weight": stretched}

    def portable(self, config: LoRAConfig, modules: tuple[str, ...]) -> LoRAConfig:
        """See AdapterMethod: PEFT alone reads DoRA, and reads scales and ranks as they are."""
        return config

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """See AdapterMethod."""
        return bool(raw.get("use_dora"))

    def to_peft(self, config: LoRAConfig) -> dict[str, Any]:
        """See AdapterMethod."""
        return super().to_peft(config) | {"use_dora": True}


register(DoRA())
