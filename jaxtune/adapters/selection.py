"""Which weights train without an adapter, and where the stack of layers is divided for that."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtune.core.errors import UserError, listed
from jaxtune.core.patterns import fullmatch

EVERYTHING = "all"
_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")
_GROUPS = {
    "norms": r".*norm\.(weight|bias)",
    "biases": r".*\.bias",
    "embeddings": r"model\.embed_tokens\.weight",
    "head": r"lm_head\.weight",
}


@dataclass(frozen=True)
class Selection:
    """The weights that train.

    Attributes:
        entries: `all`, `last:N` (the last N layers), `norms`, `biases`, `embeddings`, `head`, and
            regular expressions for consecutive parts of a tensor's Hugging Face name, such as
            `q_proj` or `layers.29`.
        layers: layers of the model.

    """

    entries: tuple[str, ...]
    layers: int

    def trains(self, name: str) -> bool:
        """Return whether the tensor of this name trains."""
        return any(self._fits(entry, name) for entry in self.entries)

    def check(self, names: Iterable[str]) -> None:
        """Check that each entry means something.

        Raises:
            UserError: an entry that is no pattern, or that fits no tensor.

        """
        names = list(names)
        for entry in self.entries:
            try:
                fits = any(self._fits(entry, name) for name in names)
            except re.error as error:
                raise UserError(
                    f"trainable: {entry!r} is not a regular expression: {error}."
                ) from None
            if not fits:
                tied = (
                    " The head is tied to the embedding: name embeddings."
                    if entry in ("head", "lm_head")
                    else ""
                )
                parts = {part for name in names for part in name.split(".")[:-1]}
                known = sorted(part for part in parts if not part.isdecimal())
                raise UserError(
                    f"trainable: '{entry}' fits no weight.{tied} There are all, last:N, "
                    f"{', '.join(_GROUPS)} and parts of names: {listed(known, 20)}."
                )

    def layer_boundaries(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return the layers in which other tensors train than in the layer before."""
        trained: list[set[str]] = [set() for _ in range(self.layers)]
        for name in names:
            parts = _LAYER.fullmatch(name)
            if parts and self.trains(name):
                trained[int(parts[2])].add(parts[3])
        return tuple(at for at in range(1, self.layers) if trained[at] != trained[at - 1])

    def _fits(self, entry: str, name: str) -> bool:
        if entry == EVERYTHING:
            return True
        if last := re.fullmatch(r"last:([1-9]\d*)", entry):
            parts = _LAYER.fullmatch(name)
            return parts is not None and int(parts[2]) >= self.layers - int(last[1])
        if entry in _GROUPS:
            return re.fullmatch(_GROUPS[entry], name) is not None
        return fullmatch(rf"(.*\.)?({entry})(\..*)?", name) is not None
