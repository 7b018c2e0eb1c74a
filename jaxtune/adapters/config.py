"""What an adapter is, whatever its method: by PEFT's rules, which modules it lies on."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from jaxtune.core.patterns import fullmatch

ALL_LINEAR = "all-linear"

Names = tuple[str, ...] | str
"""Names of modules, or a regular expression for a whole name."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Expression = Annotated[str, AfterValidator(_compiles)]
ModuleNames = Annotated[Expression | list[str], Field(min_length=1)]


@dataclass(frozen=True)
class PeftKey:
    """What a key of `adapter_config.json` may hold.

    Attributes:
        type: as pydantic takes it, with its range.
        words: the same for a person.
        required: whether it must be there; else null stands for a key that is not.

    """

    type: Any
    words: str
    required: bool = False


UNCHECKED = PeftKey(Any, "anything")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter, but for the numbers of its method. Modules go by Hugging Face's names, such as
    `model.layers.0.self_attn.q_proj`.

    Attributes:
        method: name of the method; see `adapters.method`.
        targets: `all-linear` (the blocks' linear layers), names of modules, or a regular expression
            for a whole name.
        excluded: names, or a regular expression, of modules that are left out.
        layers: numbers of the layers that are adapted; None: all.
        layers_pattern: what the list of layers is called, for `layers`; empty: any.
        saved: ends of names of modules that are trained whole.
        bias: biases that train: none, those of adapted layers (`lora_only`), or all.
        tokens: `(name of the embedding or the head, ids)` whose rows are the adapter's own (PEFT's
            trainable tokens).
        tokens_train: whether those rows train, or only come with the adapter.
        copies: tensors of the base that the adapter's file repeats.

    """

    method: ClassVar[str]

    targets: Names = ALL_LINEAR
    excluded: Names = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tokens_train: bool = True
    copies: tuple[str, ...] = ()

    def with_dropout(self, rate: float) -> "AdapterConfig":
        """Return the same adapter with this dropout in training, where its method has one."""
        return self

    def is_target(self, name: str, in_block: bool) -> bool:
        """Return whether the module of this name is adapted.

        Args:
            name: of the module.
            in_block: whether it is a linear layer of a block.

        """
        if self.is_saved(name) or (self.excluded and matches(self.excluded, name)):
            return False
        named = in_block if self.targets == ALL_LINEAR else matches(self.targets, name)
        return named and (self.layers is None or self._layer(name) in self.layers)

    def _layer(self, name: str) -> int | None:
        # The first number of a name is the layer's; an expert's comes after it.
        patterns = self.layers_pattern or (r"[^.]*",)
        numbers = (fullmatch(rf"(?:.*?\.)?{pattern}\.(\d+)\..*", name) for pattern in patterns)
        return next((int(number[1]) for number in numbers if number), None)

    def is_saved(self, name: str) -> bool:
        """Return whether the module of this name, or one around it, is trained whole."""
        parts = name.split(".")
        return any(
            ".".join(parts[:size]).endswith(end)
            for size in range(1, len(parts) + 1)
            for end in self.saved
        )


def matches(names: Names, name: str) -> bool:
    """Return whether a module's name is one of the names, ends with one, or is what the regular
    expression describes.
    """
    if isinstance(names, str):
        return fullmatch(names, name) is not None
    return any(name == end or name.endswith("." + end) for end in names)


def names_from_peft(value: Any) -> Names:
    """Return the names, or the regular expression, that a key of `adapter_config.json` holds."""
    return value if isinstance(value, str) else tuple(sorted(value or ()))


def names_to_peft(names: tuple[Any, ...] | str | None) -> list[Any] | str | None:
    """Return names, or numbers, as `adapter_config.json` holds them; None where there are none."""
    return names if isinstance(names, str) else sorted(names or ()) or None
