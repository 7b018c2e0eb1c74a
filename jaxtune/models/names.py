"""What Hugging Face calls the parts of our tree, where layers of one structure lie in one leaf
and so do a layer's experts.
"""

from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families.table import FAMILIES

STACK, EXPERTS = "layers", "experts"


def names_of(path: tuple[Any, ...], config: ModelConfig) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The stack's sizes and Hugging Face's names of the tensors in the leaf at a path of our tree.

    A path reads `model.layers.SEGMENT.rest`: the layers of one structure lie in one leaf, and so do
    a layer's experts.
    """
    parts = tuple(str(part) for part in path)
    if STACK not in parts:
        return (), (_renamed(".".join(parts), config),)
    cut = parts.index(STACK) + 1
    layers = config.segments[int(parts[cut])]
    before, after = ".".join(parts[:cut]), _renamed(".".join(parts[cut + 1 :]), config)
    stem, found, rest = after.partition(f".{EXPERTS}.")
    if not found or config.experts is None:
        return (len(layers),), tuple(f"{before}.{layer}.{after}" for layer in layers)
    experts = range(config.experts.count)
    names = (
        f"{before}.{layer}.{stem}.{EXPERTS}.{expert}.{rest}"
        for layer in layers
        for expert in experts
    )
    return (len(layers), len(experts)), tuple(names)


def _renamed(name: str, config: ModelConfig) -> str:
    for ours, theirs in FAMILIES[config.raw["model_type"]].renames:
        name = name.replace(ours, theirs)
    return name
