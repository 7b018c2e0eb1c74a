"""Which tensor of a file goes where in the model's tree.

Our module names are Hugging Face's and our layout is theirs, so the table is the tree itself: a path, with the layer's
number put in for stacked ones. The inverse is the same table read backwards.
"""

from dataclasses import dataclass

import jax
from flax import nnx

from jaxtune.core.errors import UserError, listed
from jaxtune.weights.tensors import Tensors

STACK = "layers"

# Buffers that old checkpoints carry and that follow from the configuration.
_DERIVED = (".rotary_emb.inv_freq", ".self_attn.rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True)
class Row:
    """One leaf of the tree and the tensors that fill it.

    Attributes:
        path: the leaf's path in the model.
        shape: shape of one tensor in the file.
        names: Hugging Face's names, one a layer where the leaf is stacked.
        stacked: whether the leaf has a leading layer axis.

    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool


def rows(state: nnx.State) -> list[Row]:
    """The table of a model's parameters.

    Args:
        state: the parameters, as arrays or as shapes.

    """
    table = []
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        assert isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        parts = tuple(str(part) for part in path)
        if STACK not in parts:
            table.append(Row(parts, tuple(leaf.shape), (".".join(parts),), stacked=False))
            continue
        cut = parts.index(STACK) + 1
        names = tuple(".".join((*parts[:cut], str(layer), *parts[cut:])) for layer in range(leaf.shape[0]))
        table.append(Row(parts, tuple(leaf.shape[1:]), names, stacked=True))
    return table


def check(table: list[Row], tensors: Tensors, where: str, tied_head: bool) -> None:
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
    wrong = [name for name, shape in expected.items() if name in found and tensors[name].shape != shape]
    if wrong:
        shapes = (f"{name} {list(tensors[name].shape)} instead of {list(expected[name])}" for name in wrong)
        problems.append(f"of the wrong shape: {listed(shapes)}")
    if problems:
        raise UserError(f"{where}: the weights do not fit the configuration. Tensors " + "; ".join(problems) + ".")


def _check_tied(tensors: Tensors, where: str) -> None:
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if head.shape != embedding.shape or (head.all() != embedding.all()).any():
        raise UserError(
            f"{where}: config.json ties the head to the embedding, and lm_head.weight differs from model.embed_tokens.weight. "
            "Set tie_word_embeddings to false in config.json if the file's head is meant."
        )
