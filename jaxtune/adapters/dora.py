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
    """

    _fused = False

    def __init__(self, base: Linear, spec: LoRASpec, a: jax.Array, b: jax.Array) -> None:
        super().__init__(base, spec, a, b)
        lengths = jnp.linalg.norm(base.weight[...].astype(jnp.float32), axis=-1)
        axes = base.weight.get_metadata()["axes"]
        self.lora_magnitude_vector = AdapterParam(lengths, axes=axes[:1])

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
        """Return by how much each row is stretched; 1 where the layer has no adapter."""
        scale = self.scale[...]
        update = scale * jnp.matmul(
            self.lora_B[...], self.lora_A[...], precision=jax.lax.Precision.HIGHEST
        )
        length = jnp.linalg.norm(self.weight[...].astype(jnp.float32) + update, axis=-1)
        return jnp.where(
            scale != 0, self.lora_magnitude_vector[...] / jax.lax.stop_gradient(length), 1.0
        )


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
            return block * (lengths[rows] / np.linalg.norm(block, axis=1))[:, None]

        return {"weight": stretched}

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """See AdapterMethod."""
        return bool(raw.get("use_dora"))

    def to_peft(self, config: LoRAConfig) -> dict[str, Any]:
        """See AdapterMethod."""
        return super().to_peft(config) | {"use_dora": True}


register(DoRA())
