"""The types that a file keeps matrices in: which tensor gets which, and how it is rounded to it.

The mixtures of K-quants are those of llama.cpp's own `llama-quantize` without an importance matrix
(src/llama-quant.cpp), and the rows are rounded by its own code, out of the package xllamacpp; the
other types by the package gguf.
"""

import ctypes
import importlib.util
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError
from jaxtune.models.config import ModelConfig
from jaxtune.weights.formats.gguf.models import GGUF_FAMILIES

# The types that large matrices may be stored in, by the name a user gives.
MATRIX_TYPES = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0", "q6_k": "Q6_K",
    "q5_k_m": "Q5_K", "q4_k_m": "Q4_K",
}  # fmt: skip
# What llama.cpp calls a file of each (`general.file_type`).
FILE_TYPES = {
    "float32": 0, "float16": 1, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bfloat16": 32,
}  # fmt: skip
_K_QUANTS = {"q6_k", "q5_k_m", "q4_k_m"}
# Where a row is no whole number of blocks of 256.
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_ROUTERS = (".mlp.gate.weight", "block_sparse_moe.gate.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_CHUNK = 1 << 22  # numbers that one thread rounds at once


def stored_type(name: str, shape: tuple[int, ...], dtype: str, config: ModelConfig) -> Any:
    """Return the `gguf.GGMLQuantizationType` that a tensor is stored in.

    Args:
        name: Hugging Face's name, or that of a tensor that only GGUF has.
        shape: its shape.
        dtype: of the file's matrices, a key of MATRIX_TYPES.
        config: the model's.

    """
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or name.endswith(_ROUTERS):
        return types.F32
    kind = MATRIX_TYPES[dtype]
    if dtype in _K_QUANTS:
        kind = _in_mixture(name, kind, dtype, config)
    if shape[-1] % gguf.GGML_QUANT_SIZES[types[kind]][0]:
        kind = "Q8_0" if _is_head(name, config) else _FALLBACKS.get(kind, "F16")
    return types[kind] if shape[-1] % gguf.GGML_QUANT_SIZES[types[kind]][0] == 0 else types.F16


def _is_head(name: str, config: ModelConfig) -> bool:
    tied = config.tie_embeddings and name == "model.embed_tokens.weight"
    return tied or name == "lm_head.weight"


def _in_mixture(name: str, kind: str, dtype: str, config: ModelConfig) -> str:
    """Return the type by `llama_tensor_get_type_impl`."""
    if _is_head(name, config):
        return "Q6_K"
    match = _LAYER.match(name)
    if match is None:
        return kind
    layer, count = int(match[1]), config.num_layers
    more_bits = dtype != "q6_k" and (
        layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2
    )
    eight_experts = config.experts is not None and config.experts.count == 8
    if ".v_proj." in name or ".qkv_proj." in name:
        kind = "Q6_K" if more_bits else kind
        if kind == "Q4_K" and _has_70b_layout(config):
            kind = "Q5_K"
        return "Q8_0" if eight_experts else kind
    if ".k_proj." in name and eight_experts:
        return "Q8_0"
    if ".o_proj." in name and eight_experts and dtype == "q4_k_m":
        return "Q5_K"
    is_down = ".down_proj." in name or name.endswith(".w2.weight")
    return "Q6_K" if is_down and more_bits else kind


def _has_70b_layout(config: ModelConfig) -> bool:
    """Return whether llama.cpp takes the model for one of 70B."""
    architecture = GGUF_FAMILIES[config.raw["model_type"]].architecture
    grouped = architecture == "LLAMA" and config.num_heads != config.num_kv_heads
    return config.num_layers == 80 and (grouped or architecture == "QWEN2")


def encode(values: np.ndarray, stored_as: Any) -> np.ndarray:
    """Return numbers rounded to a type, as the file holds them: plain ones, or bytes in blocks.

    Raises:
        UserError: a K-quant, and xllamacpp is not installed.

    """
    import gguf

    if stored_as.name in ("F32", "F16"):
        dtype = np.float32 if stored_as.name == "F32" else np.float16
        return np.ascontiguousarray(values.astype(dtype))
    wide = np.ascontiguousarray(values.astype(np.float32))
    if stored_as.name.endswith("_K"):
        return _by_llama_cpp(wide, stored_as)
    return gguf.quants.quantize(wide, stored_as)


def check_encoder(dtype: str) -> None:
    """Check that what rounds to a type is installed.

    Raises:
        UserError: it is not.

    """
    if dtype in _K_QUANTS:
        _quantize_chunk()


def _by_llama_cpp(values: np.ndarray, stored_as: Any) -> np.ndarray:
    import gguf

    quantize, size = _quantize_chunk(), values.shape[-1]
    block, block_bytes = gguf.GGML_QUANT_SIZES[stored_as]
    rows = values.reshape(-1, size)
    out = np.empty((len(rows), size // block * block_bytes), np.uint8)
    step = max(1, _CHUNK // size)

    def part(start: int) -> None:
        # The function takes what to skip as a number of elements, and writes at the same place.
        count = min(step, len(rows) - start)
        written = quantize(
            int(stored_as), rows.ctypes.data, out.ctypes.data, start * size, count, size, None
        )
        assert written == count * out.shape[1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(part, range(0, len(rows), step)))
    return out.reshape(*values.shape[:-1], out.shape[1])


@cache
def _quantize_chunk() -> Callable[..., int]:
    """Return ggml's function that rounds rows of float32 to a type."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for path in (path for folder in folders for path in Path(folder).glob("xllamacpp*.so")):
        function = getattr(ctypes.CDLL(str(path)), "ggml_quantize_chunk", None)
        if function is not None:
            number, address = ctypes.c_int64, ctypes.c_void_p
            function.argtypes = [ctypes.c_int, address, address, number, number, number, address]
            function.restype = ctypes.c_size_t
            return function
    raise UserError(
        "K-quants are rounded by llama.cpp's own code: pip install xllamacpp. Without it, "
        "--dtype q8_0 is the smallest."
    )
