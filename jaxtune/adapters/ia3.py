"""(IA)^3: a learned scale for every output of a linear layer, or for every input of a feed-forward
layer (Liu et al. 2022, section 3.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtune.adapters.config import (
    UNCHECKED,
    AdapterConfig,
    Expression,
    Names,
    PeftKey,
    matches,
    names_from_peft,
    names_to_peft,
)
from jaxtune.adapters.method import (
    AdaptedLayer,
    AdapterConstant,
    AdapterMethod,
    AdapterParam,
    RowMap,
    Site,
    register,
)
from jaxtune.config.schema import AdapterSection
from jaxtune.core.errors import UserError
from jaxtune.models.layers import Dropout, Linear
from jaxtune.models.remat import PROJECTION, named

FEEDFORWARD = "down_proj"
"""The layer whose inputs are the inner activations of the MLP, which the paper scales."""


@dataclass(frozen=True)
class IA3Config(AdapterConfig):
    """Learned scales.

    Attributes:
        feedforward: which of the targets are scaled at their input: ends of names, or a regular
            expression.

    """

    method: ClassVar[str] = "ia3"

    feedforward: Names = (FEEDFORWARD,)

    def is_feedforward(self, name: str) -> bool:
        """Return whether the module of this name is scaled at its input, by PEFT's rule."""
        if isinstance(self.feedforward, str):
            return matches(self.feedforward, name)
        return name.endswith(self.feedforward)


class IA3Active(AdapterConstant):
    """1 in layers of a stack that are adapted, 0 in the others."""


class IA3Linear(AdaptedLayer, Linear):
    """y = l * (x W^T (+ b)), or with `scales_input` y = (l * x) W^T (+ b); l [out] or [in],
    float32, at first one.
    """

    def __init__(self, base: Linear, adapted: tuple[bool, ...], *, scales_input: bool) -> None:
        self.weight, self.bias = base.weight, base.bias
        self.layers, self.scales_input = adapted, scales_input
        *stack, outputs, inputs = base.weight.shape
        axis = base.weight.get_metadata()["axes"][1 if scales_input else 0]
        ones = jnp.ones((*stack, inputs if scales_input else outputs), jnp.float32)
        self.ia3_l = AdapterParam(ones, axes=(axis,))
        self.active = IA3Active(jnp.asarray(adapted, jnp.float32).reshape(stack), axes=())

    @property
    def adapted(self) -> tuple[bool, ...]:
        """See AdaptedLayer."""
        return self.layers

    def file_index(self, leaf: str, number: int, vocab_size: int) -> tuple[Any, ...]:
        """See AdaptedLayer: [1, in] where the input is scaled, else [out, 1]."""
        (index,) = super().file_index(leaf, number, vocab_size)
        return (None, index) if self.scales_input else (index, None)

    def __call__(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None = None
    ) -> Float[Array, "*batch out"]:
        """Return the adapted linear map; there is no dropout in it."""
        if self.scales_input:
            return named(self.product(self._scaled(x)), PROJECTION)
        return self._scaled(named(self.product(x), PROJECTION))

    def as_head(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """See Linear."""
        if self.scales_input:
            return self._scaled(x), self.weight[...]
        return x, self._scaled(self.weight[...].astype(x.dtype).T).T

    def _scaled(self, values: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        scale = jnp.where(self.active[...] > 0, self.ia3_l[...], 1.0)
        return (values.astype(jnp.float32) * scale).astype(values.dtype)


class IA3(AdapterMethod[IA3Config]):
    """Scales of outputs, and of inputs of `down_proj`; the paper's targets are k_proj, v_proj and
    down_proj.
    """

    name = "ia3"
    title = "(IA)^3"
    peft_type = "IA3"
    config = IA3Config
    leaves: ClassVar[Mapping[str, str]] = {"ia3_l": "ia3_l"}
    peft_keys: ClassVar[Mapping[str, PeftKey]] = {
        "feedforward_modules": PeftKey(
            Expression | list[str], "a list of module names or a regular expression", required=True
        ),
        "fan_in_fan_out": UNCHECKED,
        "init_ia3_weights": UNCHECKED,
    }

    def wrap(self, base: Any, site: Site, config: IA3Config) -> AdaptedLayer:
        """See AdapterMethod."""
        layers = zip(site.modules, site.adapted, strict=True)
        sides = {config.is_feedforward(name) for name, hit in layers if hit}
        if len(sides) > 1:
            raise UserError(
                f"feedforward_modules: {config.feedforward!r} takes some layers of {site.name} "
                "only; name all of them."
            )
        return IA3Linear(base, site.adapted, scales_input=sides.pop())

    def merge(
        self, config: IA3Config, module: str, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, RowMap]:
        """See AdapterMethod."""
        scale = tensors["ia3_l"].astype(np.float32).reshape(-1)
        if config.is_feedforward(module):
            return {"weight": lambda block, rows: block * scale}
        return {
            "weight": lambda block, rows: block * scale[rows, None],
            "bias": lambda block, rows: block * scale[rows],
        }

    def from_section(self, section: AdapterSection) -> dict[str, Any]:
        """See AdapterMethod. PEFT wants a subset of the targets, where these are a list."""
        targets = section.targets
        if isinstance(targets, str):
            return {"feedforward": (FEEDFORWARD,)}
        return {"feedforward": tuple(name for name in targets if name.endswith(FEEDFORWARD))}

    def from_peft(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See AdapterMethod."""
        return {"feedforward": names_from_peft(raw["feedforward_modules"])}

    def to_peft(self, config: IA3Config) -> dict[str, Any]:
        """See AdapterMethod."""
        return {
            "feedforward_modules": names_to_peft(config.feedforward) or [],
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }


register(IA3())
