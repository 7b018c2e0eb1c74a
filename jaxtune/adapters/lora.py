"""LoRA: a layer whose frozen weight has a trainable update of rank r beside it (Hu et al. 2021)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtune.adapters.config import AdapterConfig, PeftKey
from jaxtune.adapters.lora_config import PEFT_KEYS, LoRAConfig, fields_of_peft
from jaxtune.adapters.method import (
    AdaptedLayer,
    AdapterConstant,
    AdapterMethod,
    AdapterParam,
    RowMap,
    Site,
    register,
)
from jaxtune.adapters.products import adapted_product, low_rank
from jaxtune.adapters.starts import started_factors
from jaxtune.config.schema import AdapterSection
from jaxtune.core.distributed import fetch
from jaxtune.models.layers import Dropout, Embedding, Linear, matmul
from jaxtune.models.remat import PROJECTION, named


class LoRAScale(AdapterConstant):
    """What B A is multiplied with, one number a layer; 0 in layers of a stack that are not
    adapted.
    """


@dataclass(frozen=True)
class LoRASpec:
    """The adapter of one leaf.

    Attributes:
        name: what tells its draws of dropout apart from other layers'.
        ranks: r of every layer of the stack, 0 where there is no adapter. The factors are padded
            with zeros to the largest: a padded entry of A meets zeros of B and the other way round,
            so it gets no gradient and stays zero.
        scales: of B A, one a layer, 0 where there is no adapter.
        dropout: rate on the adapter's input in training.

    """

    name: str
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dropout: float

    @classmethod
    def of(cls, site: Site, config: LoRAConfig) -> "LoRASpec":
        """Return what a configuration says of the layers at a site."""
        layers = tuple(zip(site.modules, site.adapted, strict=True))
        ranks = tuple(config.rank_of(name) if hit else 0 for name, hit in layers)
        scales = tuple(config.scale_of(name) if hit else 0.0 for name, hit in layers)
        return cls(site.name, ranks, scales, config.dropout)

    def scale(self, stack: tuple[int, ...]) -> LoRAScale:
        """Return the scales as an array of the stack's shape."""
        return LoRAScale(jnp.asarray(self.scales, jnp.float32).reshape(stack), axes=())

    def within(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Return which entries of a factor are not padding."""
        counted = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis)
        return counted < jnp.asarray(self.ranks).reshape(*shape[:-2], 1, 1)


class _LowRankLayer(AdaptedLayer):
    """What layers with factors share: their ranks."""

    spec: LoRASpec

    @property
    def adapted(self) -> tuple[bool, ...]:
        """See AdaptedLayer."""
        return tuple(rank > 0 for rank in self.spec.ranks)

    def file_index(self, leaf: str, number: int, vocab_size: int) -> tuple[Any, ...]:
        """See AdaptedLayer: a layer's factors are cut to its own rank."""
        axes = getattr(self, leaf).get_metadata()["axes"]
        sizes = {"rank": self.spec.ranks[number], "vocab": vocab_size}
        return tuple(slice(sizes.get(axis)) for axis in axes)

    def _portable(
        self, config: LoRAConfig, a: jax.Array, b: jax.Array
    ) -> tuple[LoRASpec, np.ndarray, np.ndarray]:
        """Return `(spec, A, B)` of one rank and one scale, the rest of each layer's scale in B."""
        rank, scale = config.rank, config.scale_of("")
        down, up = fetch((a, b))
        shares = np.asarray([own / scale for own in self.spec.scales], np.float32)
        up = up * shares.reshape(*up.shape[:-2], 1, 1)
        ranks = tuple(rank if own else 0 for own in self.spec.ranks)
        scales = tuple(scale if own else 0.0 for own in self.spec.ranks)
        spec = replace(self.spec, ranks=ranks, scales=scales)
        return spec, _padded(down, -2, rank), _padded(up, -1, rank)


def _padded(factor: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Return a factor with zeros up to the rank on its axis."""
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, widths)


class LoRALinear(_LowRankLayer, Linear):
    """y = x W^T (+ b) + scale (x A^T) B^T      (eq. 3); A [r, in], B [out, r], float32.

    Args:
        base: the layer that it replaces, or a stack of such layers.
        spec: ranks and scales.
        a: the factor A, [*stack, r, in].
        b: the factor B, [*stack, out, r].

    """

    _fused: ClassVar[bool] = True  # whether W and the factors see x alone, where nothing is dropped

    def __init__(self, base: Linear, spec: LoRASpec, a: jax.Array, b: jax.Array) -> None:
        self.weight, self.bias, self.spec = base.weight, base.bias, spec
        axes = base.weight.get_metadata()["axes"]
        self.lora_A = AdapterParam(a, axes=("rank", axes[1]))
        self.lora_B = AdapterParam(b, axes=(axes[0], "rank"), lora_plus=True)
        self.scale = spec.scale(base.weight.shape[:-2])

    def __call__(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None = None
    ) -> Float[Array, "*batch out"]:
        """Return the adapted linear map; the adapter's input is dropped out only where `dropout`
        brings keys.
        """
        dropped = self._dropped(x, dropout)
        y = self._plain(x) if dropped is x and self._fused else self._composed(x, dropped)
        return named(y if self.bias is None else y + self.bias[...].astype(y.dtype), PROJECTION)

    def portable(self, config: LoRAConfig) -> "LoRALinear":
        """See AdaptedLayer."""
        spec, a, b = self._portable(config, self.lora_A[...], self.lora_B[...])
        return LoRALinear(self, spec, jnp.asarray(a), jnp.asarray(b))

    def _plain(self, x: Float[Array, "*batch in"]) -> Any:
        axes = self.weight.get_metadata()["axes"]
        return adapted_product(
            axes, x, self.weight[...], self.lora_A[...], self._scaled(self.lora_B[...])
        )

    def _composed(self, x: Float[Array, "*batch in"], dropped: Float[Array, "*batch in"]) -> Any:
        return self.times_weight(x) + self._update(dropped, x)

    def _update(
        self, dropped: Float[Array, "*batch in"], x: Float[Array, "*batch in"]
    ) -> Float[Array, "*batch out"]:
        """Return the low-rank part of the map of an input that is dropped out, and as it was."""
        return low_rank(dropped, self.lora_A[...], self._scaled(self.lora_B[...]))

    def as_head(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """See Linear: [x, x A^T] and [W, scale B], so that the update is not rounded into the
        weight.
        """
        low, b = self._head_factors(x, dropout)
        parts = (self.weight[...], *b)
        wide = jnp.concatenate([part.astype(x.dtype) for part in parts], axis=-1)
        return jnp.concatenate([x, *low], axis=-1), wide

    def _head_factors(
        self, x: jax.Array, dropout: Dropout | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        low = matmul(self._dropped(x, dropout), self.lora_A[...])
        return [low], [self._scaled(self.lora_B[...])]

    def _scaled(self, factor: Float[Array, "out rank"]) -> Float[Array, "out rank"]:
        return factor * self.scale[...].astype(factor.dtype)

    def _dropped(self, x: jax.Array, dropout: Dropout | None) -> jax.Array:
        if dropout is None or not self.spec.dropout:
            return x
        return dropout(x, self.spec.dropout, self.spec.name)


class LoRAEmbedding(_LowRankLayer, Embedding):
    """One row of W + scale (B A)^T per token; A [r, vocab], zero at first, B [embed, r], normal,
    as PEFT has them.
    """

    def __init__(self, base: Embedding, spec: LoRASpec, key: jax.Array) -> None:
        self.weight, self.spec = base.weight, spec
        vocab, embed = base.weight.shape
        axes, rank = base.weight.get_metadata()["axes"], spec.ranks[0]
        self.lora_embedding_A = AdapterParam(
            jnp.zeros((rank, vocab), jnp.float32), axes=("rank", axes[0])
        )
        self.lora_embedding_B = AdapterParam(
            jax.random.normal(key, (embed, rank), jnp.float32), axes=(axes[1], "rank")
        )
        self.scale = spec.scale(())

    def __call__(
        self, tokens: Int[Array, "batch seq"], dtype: np.dtype
    ) -> Float[Array, "batch seq embed"]:
        """Return the tokens' rows in the compute dtype."""
        low = self.lora_embedding_A[...].T[tokens].astype(dtype)
        return super().__call__(tokens, dtype) + matmul(
            low, self.lora_embedding_B[...] * self.scale[...]
        )

    def portable(self, config: LoRAConfig) -> "LoRAEmbedding":
        """See AdaptedLayer."""
        spec, a, b = self._portable(config, self.lora_embedding_A[...], self.lora_embedding_B[...])
        layer = LoRAEmbedding(self, spec, jax.random.key(0))
        layer.lora_embedding_A.set_value(jnp.asarray(a))
        layer.lora_embedding_B.set_value(jnp.asarray(b))
        return layer


class LoRA(AdapterMethod[LoRAConfig]):
    """Low-rank updates of linear layers and of the embedding."""

    name = "lora"
    title = "LoRA"
    peft_type = "LORA"
    config = LoRAConfig
    leaves: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
    }
    wraps = (Linear, Embedding)
    keys = frozenset(
        ("rank", "alpha", "dropout", "rslora", "layers", "rank_pattern", "alpha_pattern", "bias",
         "train_tokens")
    )  # fmt: skip
    peft_keys: ClassVar[Mapping[str, PeftKey]] = PEFT_KEYS
    low_rank = True
    token_rows = True

    def wrap(self, base: Any, site: Site, config: LoRAConfig) -> AdaptedLayer:
        """See AdapterMethod. A is drawn as PEFT draws it, uniform within 1 / sqrt(in), and B is
        zero, so that training starts from the base.
        """
        spec = LoRASpec.of(site, config)
        if isinstance(base, Embedding):
            return LoRAEmbedding(base, spec, site.key)
        return LoRALinear(base, spec, *self.initial_factors(base, site, spec))

    def initial_factors(
        self, base: Linear, site: Site, spec: LoRASpec
    ) -> tuple[jax.Array, jax.Array]:
        """Return A and B as training begins."""
        *stack, outputs, inputs = base.weight.shape
        rank = max(spec.ranks)
        a = site.uniform((*stack, rank, inputs), 1 / math.sqrt(inputs))
        a = jnp.where(spec.within(a.shape, -2), a, 0)
        return a, jnp.zeros((*stack, outputs, rank), jnp.float32)

    def merge(
        self, config: LoRAConfig, module: str, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, RowMap]:
        """See AdapterMethod: W + scale B A, of the embedding W + scale (B A)^T."""
        if "lora_A" in tensors:
            a, b = tensors["lora_A"], tensors["lora_B"]
        else:
            a, b = tensors["lora_embedding_B"].T, tensors["lora_embedding_A"].T
        a, b = a.astype(np.float32), b.astype(np.float32)
        scale = np.float32(config.scale_of(module))
        return {"weight": lambda block, rows: block + scale * (b[rows] @ a)}

    def describe(self, section: AdapterSection) -> str:
        """See AdapterMethod."""
        return "rsLoRA" if section.rslora else "LoRA"

    def from_section(self, section: AdapterSection) -> dict[str, Any]:
        """See AdapterMethod."""
        return {
            "rank": section.rank,
            "alpha": section.alpha,
            "dropout": section.dropout,
            "rslora": section.rslora,
            "ranks": tuple(section.rank_pattern.items()),
            "alphas": tuple(section.alpha_pattern.items()),
        }

    def to_section(self, config: LoRAConfig) -> dict[str, Any]:
        """See AdapterMethod."""
        return {
            "method": self.name,
            "rank": config.rank,
            "alpha": config.alpha,
            "rslora": config.rslora,
            "layers": None if config.layers is None else list(config.layers),
            "rank_pattern": dict(config.ranks),
            "alpha_pattern": dict(config.alphas),
            "bias": config.bias,
        }

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """See AdapterMethod."""
        return not raw.get("use_dora")

    def from_peft(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See AdapterMethod."""
        return fields_of_peft(raw, where)

    def to_peft(self, config: LoRAConfig) -> dict[str, Any]:
        """See AdapterMethod."""
        return config.to_peft()

    def shape_in_file(self, config: LoRAConfig, module: str, leaf: str) -> dict[int, int]:
        """See AdapterMethod: the rank."""
        axes = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
        share = 1 if config.start is None else 2
        return {axes[leaf]: config.rank_of(module) // share} if leaf in axes else {}

    def needs_base(self, config: LoRAConfig) -> bool:
        """See AdapterMethod."""
        return config.start is not None

    def complete(
        self,
        config: LoRAConfig,
        module: str,
        tensors: Mapping[str, np.ndarray],
        weight: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """See AdapterMethod: [A; A0] and [B, -B0] of the start."""
        a, b = tensors["lora_A"].astype(np.float32), tensors["lora_B"].astype(np.float32)
        scale = config.scale_of(module)
        a0, b0 = started_factors(str(config.start), weight, len(a), scale)
        factors = {"lora_A": np.concatenate([a, a0]), "lora_B": np.concatenate([b, -b0], axis=1)}
        rest = weight.astype(np.float32) - np.float32(scale) * (b0 @ a0)
        return dict(tensors) | factors | {"weight": rest}

    def portable(self, config: LoRAConfig, modules: tuple[str, ...]) -> AdapterConfig:
        """See AdapterMethod."""
        return config.portable(modules)

    def completed(self, config: LoRAConfig) -> LoRAConfig:
        """See AdapterMethod."""
        return replace(config, start=None)


register(LoRA())
