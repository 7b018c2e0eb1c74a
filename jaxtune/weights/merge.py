"""An adapter merged into its base, tensor by tensor as they are read: in float32, then in the
base's dtype.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtune.adapters.config import fits
from jaxtune.weights.peft import COPY, PREFIX, TOKENS, Adapter
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged(
    base: Tensors, adapter: Adapter, config_json: dict[str, Any], dtype: np.dtype | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """`(tensors, config_json)` of the model that base and adapter compute together.

    Args:
        base: the original weights, by Hugging Face's names.
        adapter: fits the base.
        config_json: the base's; where the adapter changes one of two tied matrices, they are tied
            no longer.
        dtype: of the result's matrices that the adapter changes; the base's by default.

    """
    tied = HEAD not in base
    out = dict(base) | ({HEAD: base[EMBEDDING]} if tied else {})
    changed: Tensors = {}
    copied = {
        name for name in adapter.tensors if name.endswith(".weight") and _is_copy(name, adapter)
    }
    kept = {name: tensor for name, tensor in adapter.tensors.items() if name not in copied}
    found = {name.removeprefix(PREFIX).replace(COPY, ""): tensor for name, tensor in kept.items()}
    for name, tensor in found.items():
        module, _, leaf = name.rpartition(".lora_")
        if name.endswith(TOKENS):
            module = name.removesuffix(TOKENS)
            ids = next(ids for key, ids in adapter.config.tokens if fits((key,), module))
            out[f"{module}.weight"] = _with_rows(out[f"{module}.weight"], ids, tensor.all(), dtype)
        elif not module:
            changed[name] = tensor
        elif leaf == "A.weight":
            factors = tensor.all(), found[f"{module}.lora_B.weight"].all()
            magnitude = found.get(f"{module}.lora_magnitude_vector")
            scale = adapter.config.scale_of(module)
            changed[f"{module}.weight"] = _adapted(
                out[f"{module}.weight"],
                *factors,
                scale,
                None if magnitude is None else magnitude.all(),
            )
        elif leaf == "embedding_A":
            factors = found[f"{module}.lora_embedding_B"].all().T, tensor.all().T
            changed[f"{module}.weight"] = _adapted(
                out[f"{module}.weight"], *factors, adapter.config.scale_of(module), None
            )
    for name, tensor in changed.items():
        out[name] = tensor.astype(out[name].dtype if dtype is None else dtype)
    if tied and not changed.keys() & {EMBEDDING, HEAD}:
        del out[HEAD]
        return out, config_json
    return out, config_json | ({"tie_word_embeddings": False} if tied else {})


def _is_copy(name: str, adapter: Adapter) -> bool:
    """Whether a tensor only repeats the base's."""
    plain = name.removeprefix(PREFIX)
    return COPY in plain or (
        "lora_" not in plain and not adapter.config.is_saved(plain.removesuffix(".weight"))
    )


def _with_rows(
    weight: LazyTensor, ids: tuple[int, ...], rows: np.ndarray, dtype: np.dtype | None
) -> LazyTensor:
    """The matrix with these rows for these tokens."""
    weight = weight if dtype is None else weight.astype(dtype)

    def read(index: Index) -> np.ndarray:
        whole = np.array(weight.read(index))
        start, stop, _ = index[0].indices(weight.shape[0])
        for token, row in zip(ids, rows, strict=True):
            if start <= token < stop:
                whole[token - start] = row[index[1]].astype(weight.dtype)
        return whole

    return LazyTensor(weight.shape, weight.dtype, read)


def _adapted(
    weight: LazyTensor, a: np.ndarray, b: np.ndarray, scale: float, magnitude: np.ndarray | None
) -> LazyTensor:
    """W + scale B A in float32; with a magnitude, its rows brought to that length (see
    `adapters.lora`).
    """
    a, b = a.astype(np.float32), b.astype(np.float32)

    def rows(chosen: slice) -> np.ndarray:
        whole = weight.read((chosen, slice(0, weight.shape[1]))).astype(np.float32)
        whole = whole + np.float32(scale) * (b[chosen] @ a)
        if magnitude is None:
            return whole
        return (
            whole * (magnitude[chosen].astype(np.float32) / np.linalg.norm(whole, axis=1))[:, None]
        )

    return LazyTensor(weight.shape, np.dtype("float32"), _by_rows(rows))


def _by_rows(rows: Callable[[slice], np.ndarray]) -> Callable[[Index], np.ndarray]:
    return lambda index: rows(index[0])[:, index[1]] if index else rows(slice(None))
