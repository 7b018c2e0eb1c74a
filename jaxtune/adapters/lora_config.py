"""The numbers of a low-rank adapter, and what `adapter_config.json` of PEFT calls them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field

from jaxtune.adapters.config import (
    UNCHECKED,
    AdapterConfig,
    Expression,
    PeftKey,
    names_to_peft,
)
from jaxtune.adapters.starts import start_of_peft
from jaxtune.config.types import Index
from jaxtune.core.patterns import fullmatch

Number = TypeVar("Number", int, float)

_Rank = Annotated[int, Field(ge=1, lt=2**31)]
_Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PEFT_KEYS: Mapping[str, PeftKey] = {
    "r": PeftKey(_Rank, "a whole number from 1 on", required=True),
    "lora_alpha": PeftKey(_Alpha, "a finite number above 0", required=True),
    "lora_dropout": PeftKey(Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1"),
    "use_rslora": PeftKey(bool, "true or false"),
    "use_dora": PeftKey(bool, "true or false"),
    "layers_to_transform": PeftKey(Index | list[Index], "a number of a layer, or a list of such"),
    "layers_pattern": PeftKey(Expression | list[Expression], "a name, or a list of names"),
    "rank_pattern": PeftKey(
        dict[Expression, _Rank], "names or regular expressions with a whole number from 1 on each"
    ),
    "alpha_pattern": PeftKey(
        dict[Expression, _Alpha], "names or regular expressions with a finite number above 0 each"
    ),
    "bias": PeftKey(Literal["none", "all", "lora_only"], "none, all or lora_only"),
    "init_lora_weights": PeftKey(bool | str, "true, false or the name of a start"),
    **dict.fromkeys(
        ("ensure_weight_tying", "fan_in_fan_out", "megatron_core", "loftq_config",
         "qalora_group_size", "corda_config", "eva_config", "lora_ga_config"),
        UNCHECKED,
    ),
}  # fmt: skip


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
        start: what half of the ranks, which the file has not, comes from; see `adapters.starts`.

    """

    method: ClassVar[str] = "lora"

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    start: str | None = None

    def doubled(self) -> Self:
        """Return the adapter of twice the ranks and the same scales."""
        factor = 2.0**0.5 if self.rslora else 2.0
        return replace(
            self,
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            ranks=tuple((name, 2 * rank) for name, rank in self.ranks),
            alphas=tuple((name, factor * alpha) for name, alpha in self.alphas),
        )

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

    def portable(self, modules: tuple[str, ...]) -> Self:
        """Return the adapter with one rank and one scale on all of these modules.

        That is r and alpha as they are where every reader finds them so, else the largest rank and
        the scale 1, which factors must follow.
        """
        ranks = {self.rank_of(name) for name in modules}
        scales = {self.scale_of(name) for name in modules}
        rank, scale = max(ranks), max(scales)
        if len(ranks) > 1 or len(scales) > 1 or self.rslora:
            alpha = float(rank)
        else:
            alpha = self.alpha if scale == self.alpha / rank else scale * rank
        plain = replace(self, rank=rank, alpha=alpha, rslora=False, ranks=(), alphas=())
        return self if plain == self else plain

    def to_peft(self) -> dict[str, Any]:
        """Return the keys of `adapter_config.json`."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": False,
            "layers_to_transform": names_to_peft(self.layers),
            "layers_pattern": list(self.layers_pattern) or None,
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
            "bias": self.bias,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }


def fields_of_peft(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of `LoRAConfig` that a checked `adapter_config.json` gives; with a start
    the ranks are twice those of the file.

    Raises:
        UserError: a start that cannot be repeated; `where` is the file.

    """
    layers, pattern = raw.get("layers_to_transform"), raw.get("layers_pattern") or ()
    config = LoRAConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        dropout=float(raw.get("lora_dropout") or 0.0),
        rslora=bool(raw.get("use_rslora")),
        layers=(layers,) if isinstance(layers, int) else (tuple(layers or ()) or None),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
        ranks=tuple((raw.get("rank_pattern") or {}).items()),
        alphas=tuple((raw.get("alpha_pattern") or {}).items()),
        bias=raw.get("bias") or "none",
        start=start_of_peft(raw, where),
    )
    config = config if config.start is None else config.doubled()
    others = ("targets", "excluded", "saved", "tokens")
    return {name: value for name, value in vars(config).items() if name not in others}


def _by_pattern(patterns: tuple[tuple[str, Number], ...], name: str, otherwise: Number) -> Number:
    return next(
        (value for key, value in patterns if fullmatch(rf"(.*\.)?({key})", name)), otherwise
    )
