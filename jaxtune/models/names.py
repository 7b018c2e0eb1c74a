"""Hugging Face's names for the leaves of a model, in which layers of one structure are stacked and
so are a layer's experts.
"""

from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families.table import FAMILIES

STACK, EXPERTS = "layers", "experts"


def names_of(path: tuple[Any, ...], config: ModelConfig) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the sizes of a leaf's stack and Hugging Face's names of the tensors in it.

    The leaf's path is `model.layers.SEGMENT.rest` where it is stacked. Its leading axes are the
    layers of the segment and, in a mixture, the experts of a layer.
    """
    parts = tuple(str(part) for part in path)
    if STACK not in parts:
        return (), (_renamed(".".join(parts), config),)
    at = parts.index(STACK) + 1
    layers = config.segments[int(parts[at])]
    before, after = ".".join(parts[:at]), _renamed(".".join(parts[at + 1 :]), config)
    stem, separator, rest = after.partition(f".{EXPERTS}.")
    if not separator or config.experts is None:
        return (len(layers),), tuple(f"{before}.{layer}.{after}" for layer in layers)
    experts = range(config.experts.count)
    names = (
        f"{before}.{layer}.{stem}.{EXPERTS}.{expert}.{rest}"
        for layer in layers
        for expert in experts
    )
    return (len(layers), len(experts)), tuple(names)


def _renamed(name: str, config: ModelConfig) -> str:
    for part, part_in_files in FAMILIES[config.raw["model_type"]].renames:
        name = name.replace(part, part_in_files)
    return name
