"""Starts that PEFT takes out of the base again whenever it loads the adapter: what its file holds
then belongs on W - scale B0 A0. Here the base stays as it is and the adapter gets twice the rank,
[A; A0] and [B, -B0], which computes the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError

Factors = tuple[np.ndarray, np.ndarray]

_UNCHANGING = ("gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")


def start_of_peft(raw: Mapping[str, Any], where: str) -> str | None:
    """Return the start that has to be taken out of the base; None where the base stays as it is.

    Raises:
        UserError: one that cannot be repeated from the base alone; `where` is the file.

    """
    init = raw.get("init_lora_weights")
    if init is None or isinstance(init, bool) or init.lower() in _UNCHANGING:
        return None
    name = init if init == "pissa" else init.lower()
    if name in _STARTS:
        return name
    if name.startswith(_CONVERTIBLE):
        mend = (
            "Convert it in PEFT, with the adapter as it was before training: model.save_pretrained("
            "DIR, path_initial_model_for_weight_conversion=START)."
        )
    else:
        mend = "Merge it in PEFT, merge_and_unload(), and save the model."
    raise UserError(
        f"{where}: init_lora_weights {init!r}: the adapter belongs on a base that was changed as "
        f"training began, which the base and these files do not tell. {mend}"
    )


def started_factors(start: str, weight: np.ndarray, rank: int, scale: float) -> Factors:
    """Return A0 [rank, in] and B0 [out, rank] of a start; scale B0 A0 is what PEFT subtracts.

    Args:
        start: `pissa` or `olora`.
        weight: of the base, [out, in].
        rank: of the adapter in the file.
        scale: of its update.

    """
    return _STARTS[start](weight.astype(np.float32), rank, np.float32(scale))


def _pissa(weight: np.ndarray, rank: int, scale: np.float32) -> Factors:
    """Return the principal part of W over scale (Meng et al. 2024, eq. 2 to 4): W on the space of
    its first singular vectors, those of the smaller side.
    """
    if weight.shape[0] > weight.shape[1]:
        a, b = _pissa(weight.T, rank, scale)
        return b.T, a.T
    from scipy.linalg import eigh

    gram = np.zeros((len(weight), len(weight)), np.float64)
    for start in range(0, weight.shape[1], 4096):
        block = weight[:, start : start + 4096].astype(np.float64)
        gram += block @ block.T
    vectors = eigh(gram, subset_by_index=[len(gram) - rank, len(gram) - 1])[1]
    b = vectors.astype(np.float32)
    return (b.T @ weight) / scale, b


def _olora(weight: np.ndarray, rank: int, scale: np.float32) -> Factors:
    """Return the first columns of Q and rows of R of W = Q R (Büyükakyüz 2024)."""
    q = np.linalg.qr(weight[:, :rank])[0]
    return q.T @ weight, q


_STARTS: dict[str, Callable[[np.ndarray, int, np.float32], Factors]] = {
    "pissa": _pissa,
    "olora": _olora,
}
