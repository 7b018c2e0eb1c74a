"""LoRA: a layer whose frozen weight has a trainable update of rank r beside it (Hu et al. 2021)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtune.adapters.config import AdapterConfig, names_from_peft, names_to_peft
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
from jaxtune.config.schema import AdapterSection
from jaxtune.core.errors import UserError
from jaxtune.core.patterns import fullmatch
from jaxtune.models.layers import Dropout, Embedding, Linear, matmul
from jaxtune.models.remat import PROJECTION, named

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """A low-rank adapter.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with `rslora` (Kalajdzievski
            2023).
        dropout: rate on the adapter's input in training.
        rslora: see alpha.
        ranks, alphas: `(end of a name or regular expression, value)` where rank or alpha differ;
            the first that fits counts.

    """

    method: ClassVar[str] = "lora"

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def with_dropout(self, rate: float) -> "LoRAConfig":
        """Return the same adapter with this dropout in training."""
        return replace(self, dropout=rate)

    def rank_of(self, name: str) -> int:
        """Return the rank on the module of this name."""
        return _by_pattern(self.ranks, name, self.rank)

    def scale_of(self, name: str) -> float:
        """Return what B A is multiplied with on the module of this name."""
        rank = self.rank_of(name)
        alpha = _by_pattern(self.alphas, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: tuple[tuple[str, Number], ...], name: str, otherwise: Number) -> Number:
    return next(
        (value for key, value in patterns if fullmatch(rf"(.*\.)?({key})", name)), otherwise
    )


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
    peft_keys = frozenset(
        ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "layers_to_transform",
         "layers_pattern", "rank_pattern", "alpha_pattern", "bias", "ensure_weight_tying",
         "init_lora_weights", "megatron_core", "loftq_config", "qalora_group_size", "corda_config",
         "eva_config")
    )  # fmt: skip
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
        if "r" not in raw or "lora_alpha" not in raw:
            raise UserError(f"{where}: r or lora_alpha is missing.")
        if (bias := raw.get("bias") or "none") not in ("none", "all", "lora_only"):
            raise UserError(
                f"{where}: bias {bias!r} is not supported; supported are none, all and lora_only."
            )
        layers, pattern = raw.get("layers_to_transform"), raw.get("layers_pattern")
        if isinstance(pattern, str):
            pattern = [pattern] if pattern else []
        return {
            "rank": raw["r"],
            "alpha": float(raw["lora_alpha"]),
            "dropout": float(raw.get("lora_dropout") or 0.0),
            "rslora": bool(raw.get("use_rslora")),
            "layers": (layers,) if isinstance(layers, int) else (tuple(layers or ()) or None),
            "layers_pattern": names_from_peft(pattern),
            "ranks": tuple((raw.get("rank_pattern") or {}).items()),
            "alphas": tuple((raw.get("alpha_pattern") or {}).items()),
            "bias": bias,
        }

    def to_peft(self, config: LoRAConfig) -> dict[str, Any]:
        """See AdapterMethod."""
        return {
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.rslora,
            "use_dora": False,
            "layers_to_transform": names_to_peft(config.layers),
            "layers_pattern": names_to_peft(config.layers_pattern),
            "rank_pattern": dict(config.ranks),
            "alpha_pattern": dict(config.alphas),
            "bias": config.bias,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }


register(LoRA())
