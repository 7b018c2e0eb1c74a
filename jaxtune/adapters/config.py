"""What an adapter is: its numbers, and by PEFT's rules which modules it lies on."""

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeVar

ALL_LINEAR = "all-linear"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoRAConfig:
    """An adapter. Modules go by Hugging Face's names, such as `model.layers.0.self_attn.q_proj`.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with `rslora` (Kalajdzievski
            2023).
        dropout: rate on the adapter's input in training.
        rslora: see alpha.
        dora: the adapted rows are normalized and get a trained magnitude (Liu et al. 2024).
        targets: `all-linear` (the blocks' linear layers), names of modules, or a regular expression
            for a whole name.
        excluded: names, or a regular expression, of modules that are left out.
        layers: numbers of the layers that are adapted; None: all.
        layers_pattern: what the list of layers is called, for `layers`; empty: any.
        ranks, alphas: `(end of a name or regular expression, value)` where rank or alpha differ;
            the first that fits counts.
        saved: ends of names of modules that are trained whole.
        bias: biases that train: none, those of adapted layers, or all.
        tokens: `(name of the embedding or the head, ids)` whose rows are the adapter's own (PEFT's
            trainable tokens).
        tokens_train: whether those rows train, or only come with the adapter.
        copies: tensors of the base that the adapter's file repeats.

    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] | str = ALL_LINEAR
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    saved: tuple[str, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tokens_train: bool = True
    copies: tuple[str, ...] = ()

    def is_target(self, name: str, in_block: bool) -> bool:
        """Whether the module of this name is adapted; `in_block`: whether it is a linear layer
        of a block.
        """
        if self.is_saved(name) or (self.excluded and fits(self.excluded, name)):
            return False
        chosen = in_block if self.targets == ALL_LINEAR else fits(self.targets, name)
        return chosen and (self.layers is None or self._layer(name) in self.layers)

    def _layer(self, name: str) -> int | None:
        patterns = self.layers_pattern or (r"[^.]*",)
        found = next(
            (hit for pattern in patterns if (hit := re.match(rf".*\.{pattern}\.(\d+)\.", name))),
            None,
        )
        return int(found[1]) if found else None

    def is_saved(self, name: str) -> bool:
        """Whether the module of this name, or one around it, is trained whole."""
        parts = name.split(".")
        return any(
            ".".join(parts[:size]).endswith(end)
            for size in range(1, len(parts) + 1)
            for end in self.saved
        )

    def rank_of(self, name: str) -> int:
        """The rank on the module of this name."""
        return _pattern(self.ranks, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What B A is multiplied with on the module of this name."""
        rank = self.rank_of(name)
        return _pattern(self.alphas, name, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def fits(targets: tuple[str, ...] | str, name: str) -> bool:
    """Whether a module's name is one of the names, ends with one, or is what the regular
    expression describes.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _pattern(patterns: tuple[tuple[str, Number], ...], name: str, otherwise: Number) -> Number:
    return next(
        (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name)), otherwise
    )
