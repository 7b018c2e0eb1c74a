"""Which tensor of a file goes where in the model's tree.

Our module names are Hugging Face's and our layout is theirs, so the table is the tree itself: a
path, with the numbers of the layer and of the expert put in for stacked ones, and a family's few
other names. The inverse is the same table read backwards.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import ModelConfig
from jaxtune.models.kernels.quantized import QuantizedTensor
from jaxtune.models.names import names_of
from jaxtune.weights.tensors import Tensors

# Buffers that old checkpoints carry and that follow from the configuration.
_DERIVED = (".rotary_emb.inv_freq", ".self_attn.rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True)
class LeafMapping:
    """One leaf of the tree and the tensors that fill it.

    Attributes:
        path: the leaf's path in the model.
        shape: shape of one tensor in the file.
        stack: sizes of the leaf's leading axes: layers, experts; empty where one tensor is the
            leaf.
        names: Hugging Face's names, in the order of the stack's axes.

    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    names: tuple[str, ...]


def leaf_mappings(state: nnx.State, config: ModelConfig) -> list[LeafMapping]:
    """The table of a model's parameters.

    Args:
        state: the parameters, as arrays or as shapes.
        config: the model's architecture.

    """
    table = []
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        assert isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | QuantizedTensor)
        stack, names = names_of(path, config)
        table.append(LeafMapping(path, tuple(leaf.shape[len(stack) :]), stack, names))
    return table


def check(table: list[LeafMapping], tensors: Tensors, where: str, tied_head: bool) -> None:
    """Every tensor of the table is there with its shape, and no other.

    Raises:
        UserError: missing, unexpected and misshapen tensors, by name.

    """
    expected = {name: row.shape for row in table for name in row.names}
    found = {name for name in tensors if not name.endswith(_DERIVED)}
    if tied_head and "lm_head.weight" in found:
        _check_tied(tensors, where)
        found.remove("lm_head.weight")
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing: {listed(missing)}")
    if unexpected := sorted(found - expected.keys()):
        problems.append(f"unexpected: {listed(unexpected)}")
    wrong = [
        name for name, shape in expected.items() if name in found and tensors[name].shape != shape
    ]
    if wrong:
        shapes = (
            f"{name} {list(tensors[name].shape)} instead of {list(expected[name])}"
            for name in wrong
        )
        problems.append(f"of the wrong shape: {listed(shapes)}")
    if problems:
        raise UserError(
            f"{where}: the weights do not fit the configuration. Tensors "
            + "; ".join(problems)
            + "."
        )


def _check_tied(tensors: Tensors, where: str) -> None:
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if head.shape != embedding.shape or (head.all() != embedding.all()).any():
        raise UserError(
            f"{where}: config.json ties the head to the embedding, and lm_head.weight differs "
            "from model.embed_tokens.weight. "
            "Set tie_word_embeddings to false in config.json if the file's head is meant."
        )
