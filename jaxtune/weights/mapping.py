"""Which tensors of a file fill which leaf of the model's tree.

The model has Hugging Face's module names and layout, so the table is the tree itself: a leaf's
path, with the numbers of layer and expert inserted where leaves are stacked, and a family's few
other names. Exports read the same table backwards.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.core.distributed import fetch
from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import ModelConfig
from jaxtune.models.kernels.quantized import QuantizedTensor
from jaxtune.models.names import names_of
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_OF_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# Buffers in old checkpoints that follow from the configuration.
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
    """Return the table of a model's parameters.

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


def model_tensors(state: nnx.State, config: ModelConfig) -> Tensors:
    """Return a model's parameters by Hugging Face's names, in float32, unread and without padding.

    Args:
        state: the parameters.
        config: the model's architecture.

    """
    tensors: Tensors = {}
    leaves = [variable.get_value() for _, variable in nnx.to_flat_state(state)]
    for row, leaf in zip(leaf_mappings(state, config), leaves, strict=True):
        for number, name in enumerate(row.names):
            place = np.unravel_index(number, row.stack) if row.stack else ()
            size = config.vocab_size if name in _OF_VOCABULARY else row.shape[0]
            read = partial(_read, leaf, (*place, slice(size)))
            quantized = isinstance(leaf, QuantizedTensor)
            tensors[name] = LazyTensor((size, *row.shape[1:]), np.dtype("float32"), read, quantized)
    return tensors


def _read(leaf: jax.Array, place: tuple[Any, ...], index: Index) -> np.ndarray:
    return fetch(leaf[place].astype(jnp.float32)[index])


def check_tensors(table: list[LeafMapping], tensors: Tensors, where: str, tied_head: bool) -> None:
    """Check that the tensors are exactly those of the table, with their shapes.

    Raises:
        UserError: there are missing, unexpected or misshapen tensors; the message names them.

    """
    expected = {name: row.shape for row in table for name in row.names}
    present = {name for name in tensors if not name.endswith(_DERIVED)}
    if tied_head and "lm_head.weight" in present:
        _check_tied(tensors, where)
        present.remove("lm_head.weight")
    problems = []
    if missing := [name for name in expected if name not in present]:
        problems.append(f"missing: {listed(missing)}")
    if unexpected := sorted(present - expected.keys()):
        problems.append(f"unexpected: {listed(unexpected)}")
    if misshapen := [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in present and tensors[name].shape != shape
    ]:
        problems.append(f"of the wrong shape: {listed(misshapen)}")
    if problems:
        raise UserError(
            f"{where}: the weights do not fit the configuration. Tensors {'; '.join(problems)}."
        )


def _check_tied(tensors: Tensors, where: str) -> None:
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if head.shape != embedding.shape or (head.all() != embedding.all()).any():
        raise UserError(
            f"{where}: config.json ties the head to the embedding, but lm_head.weight differs from "
            "model.embed_tokens.weight. To use the file's head, set tie_word_embeddings to false "
            "in config.json."
        )
