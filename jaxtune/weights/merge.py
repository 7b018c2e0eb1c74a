"""An adapter merged into its base, tensor by tensor as they are read: in float32, then in the
base's dtype.
"""

from typing import Any

import numpy as np

from jaxtune.adapters.method import RowMap
from jaxtune.weights.peft import Adapter
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged(
    base: Tensors, adapter: Adapter, config_json: dict[str, Any], dtype: np.dtype | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Return `(tensors, config_json)` of the model that base and adapter compute together.

    Args:
        base: the original weights, by Hugging Face's names.
        adapter: fits the base.
        config_json: the base's; where the adapter changes only one of two tied matrices, they are
            no longer tied.
        dtype: of the result's matrices that the adapter changes; the base's by default.

    """
    adapter = adapter.on(base)
    tied = HEAD not in base
    out = dict(base) | ({HEAD: base[EMBEDDING]} if tied else {})
    changed = adapter.whole_tensors()
    unties = set(changed)
    for layer in adapter.layers():
        for leaf, row_map in layer.method.merge(adapter.config, layer.module, layer.leaves).items():
            name = f"{layer.module}.{leaf}"
            if name in out:
                changed[name] = _mapped(out[name], row_map)
                unties |= set() if layer.method.keeps_ties else {name}
    for name, tensor in changed.items():
        out[name] = tensor.astype(out[name].dtype if dtype is None else dtype)
    if tied and not unties & {EMBEDDING, HEAD}:
        del out[HEAD]
        return out, config_json
    return out, config_json | ({"tie_word_embeddings": False} if tied else {})


def _mapped(tensor: LazyTensor, row_map: RowMap) -> LazyTensor:
    """Return a tensor whose rows are changed, in float32, as they are read."""

    def read(index: Index) -> np.ndarray:
        rows = slice(*index[0].indices(tensor.shape[0])[:2])
        whole = (rows, *(slice(0, size) for size in tensor.shape[1:]))
        block = row_map(tensor.read(whole).astype(np.float32), rows)
        return block[(slice(None), *index[1:])]

    return LazyTensor(tensor.shape, np.dtype("float32"), read)
