"""Meta's own files of Llama: `params.json` and `consolidated.NN.pth`, one file for each part of a
model-parallel training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import read_json, write_json
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.models.config import ModelConfig
from jaxtune.models.families.config_types import check_config
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights import torch_files
from jaxtune.weights.formats.format import ModelContents, ModelFormat
from jaxtune.weights.interleave import half_split, interleaved
from jaxtune.weights.source import Source
from jaxtune.weights.tensors import Index, LazyTensor, Tensors
from jaxtune.weights.tokenizer_files import load_tokenizer

PARAMS = "params.json"
_PART = "consolidated.*.pth"
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_READ = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "vocab_size", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor",
    "max_seq_len", "max_batch_size",
}  # fmt: skip
# Llama 3.1's frequency scaling: constants in Meta's code, switched on by `use_scaled_rope`.
_SCALED = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class MetaDirectory(Source):
    """A directory in Meta's format."""

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path / PARAMS

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return config_json(self.path)

    def tensors(self) -> Tensors:
        """See Source."""
        return open_weights(self.path)

    def tokenizer(self) -> Tokenizer | None:
        """Return a tokenizer in Hugging Face's format beside the weights; Meta's own
        `tokenizer.model` alone is not read.
        """
        return load_tokenizer(self.path) if (self.path / "tokenizer.json").exists() else None


class MetaFormat(ModelFormat):
    """Meta's files in one part."""

    name = "meta"
    description = "A model in the format of Meta's own code."
    needs = f"a directory with Meta's {PARAMS}"

    def recognizes(self, path: Path) -> bool:
        """See ModelFormat; Meta's releases on the hub also have Hugging Face's files."""
        return (path / PARAMS).exists() and not (path / "config.json").exists()

    def open(self, path: Path, name: str) -> Source:
        """See ModelFormat."""
        return MetaDirectory(name, path)

    def write(self, path: Path, contents: ModelContents) -> None:
        """Write `params.json` and `consolidated.00.pth`, in Meta's names and row order.

        PyTorch can only save tensors that are all in memory, so they are gathered in a scratch file
        mapped to it.

        Raises:
            UserError: a model that Meta's code does not compute.

        """
        config = from_hf(contents.config_json, str(path))
        write_json(path / PARAMS, _params(config))
        scratch = path / ".scratch"
        try:
            torch_files.write_file(
                path / "consolidated.00.pth",
                _named_by_meta(self.round_trip(contents), config),
                scratch,
            )
        finally:
            scratch.unlink(missing_ok=True)
        contents.write_companions(path)


FORMAT = MetaFormat()


def config_json(path: Path) -> dict[str, Any]:
    """Return what `config.json` would say of a directory in Meta's format.

    Raises:
        UserError: parameters that are missing or that this code does not implement.

    """
    params, where = _read_params(path), path / PARAMS
    if missing := [key for key in ("dim", "n_layers", "n_heads") if key not in params]:
        raise UserError(f"{where}: {listed(missing)} is missing.")
    if unknown := [key for key, value in params.items() if key not in _READ and value]:
        raise UserError(f"{where}: parameters that jaxtune does not understand: {listed(unknown)}.")
    tensors = open_weights(path)
    gate, embedding = "model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"
    if missing := [name for name in (gate, embedding) if name not in tensors]:
        raise UserError(f"{path}: the files hold no {listed(missing)} of Llama.")
    theta = float(params.get("rope_theta") or 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if params.get("use_scaled_rope"):
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": _factor(params), **_SCALED}
        rope["high_freq_factor"] = float(
            params.get("rope_high_freq_factor") or rope["high_freq_factor"]
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors[embedding].shape[0],
        "hidden_size": params["dim"],
        "intermediate_size": tensors[gate].shape[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "max_position_embeddings": params.get("max_seq_len") or _context(params, theta),
        "rope_parameters": rope,
        "tie_word_embeddings": _is_tied(tensors),
        "attention_bias": False,
        "mlp_bias": False,
    }


def _read_params(path: Path) -> dict[str, Any]:
    raw = read_json(path / PARAMS)
    # Meta's older files say -1 for the vocabulary, which the tokenizer has.
    unknown = isinstance(raw, dict) and raw.get("vocab_size") == -1
    check_config({**raw, "vocab_size": None} if unknown else raw, str(path / PARAMS))
    return raw


def _is_tied(tensors: Tensors) -> bool:
    """Return whether the head is the embedding, of which Meta's files hold a copy."""
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    if head is None or head.shape != embedding.shape:
        return False
    pairs = zip(head.blocks(), embedding.blocks(), strict=True)
    return all((head_rows == embedding_rows).all() for head_rows, embedding_rows in pairs)


def _factor(params: dict[str, Any]) -> float:
    """Return the factor on the longest wavelengths: 8 in Llama 3.1, 32 in the small models of 3.2,
    which are known by their width.
    """
    return float(params.get("rope_scaling_factor") or (32.0 if params["dim"] <= 3072 else 8.0))


def _context(params: dict[str, Any], theta: float) -> int:
    """Return the context length of each generation, which params.json does not say."""
    if params.get("use_scaled_rope"):
        return 131072
    if theta != 10000.0:
        return 8192 if params.get("vocab_size", 0) > 100_000 else 16384
    return 4096 if params.get("norm_eps") == 1e-5 else 2048


def open_weights(path: Path) -> Tensors:
    """Return the tensors under Hugging Face's names and in its row order, the parts joined as they
    are read.

    Raises:
        UserError: there are no files, or a part disagrees with the others.

    """
    files = sorted(path.glob(_PART))
    if not files:
        raise UserError(f"{path} holds {PARAMS} and no consolidated.NN.pth.")
    numbers = [file.name.split(".")[1] for file in files]
    if numbers != [f"{number:02}" for number in range(len(files))]:
        raise UserError(
            f"{path}: of the parts consolidated.NN.pth there are {listed(numbers, 20)}; some are "
            "missing."
        )
    parts = [torch_files.open_file(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if odd := sorted(part.keys() ^ parts[0].keys()):
            raise UserError(
                f"{file} and {files[0].name} do not hold the same tensors: {listed(odd)}."
            )
    params = _read_params(path)
    heads, width = params["n_heads"], params["dim"]
    kv_heads = params.get("n_kv_heads") or heads
    named: Tensors = {}
    for name in parts[0]:
        if name == "rope.freqs":
            continue  # follows from the parameters
        stem, _, suffix = name.rpartition(".")
        joined = _joined(
            [part[name] for part in parts], _axis(stem, parts[0][name], width, len(parts))
        )
        if stem.startswith("layers.") and stem.split(".", 2)[2] in _LAYER:
            _, layer, kind = stem.split(".", 2)
            if kind in ("attention.wq", "attention.wk"):
                joined = half_split(joined, heads if kind == "attention.wq" else kv_heads)
            named[f"model.layers.{layer}.{_LAYER[kind]}.{suffix}"] = joined
        else:
            named[f"{_TOP.get(stem, stem)}.{suffix}"] = joined
    return named


def _axis(stem: str, part: LazyTensor, width: int, parts: int) -> int | None:
    """Return the axis that a tensor is split along; None where every part holds all of it."""
    if parts == 1 or len(part.shape) == 1:
        return None
    if stem.endswith((".wo", ".w2")):
        return 1
    if stem == "tok_embeddings":  # split by width up to Llama 2, by vocabulary since
        return 0 if part.shape[1] == width else 1
    return 0


def _joined(parts: Sequence[LazyTensor], axis: int | None) -> LazyTensor:
    if axis is None:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)

    def read(index: Index) -> np.ndarray:
        index = index or tuple(slice(None) for _ in shape)
        start, stop, _ = index[axis].indices(shape[axis])
        pieces, offset = [], 0
        for part in parts:
            size = part.shape[axis]
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                pieces.append(part.read((*index[:axis], slice(low, high), *index[axis + 1 :])))
            offset += size
        return np.concatenate(pieces, axis=axis)

    return LazyTensor(tuple(shape), parts[0].dtype, read)


def _named_by_meta(tensors: Tensors, config: ModelConfig) -> Tensors:
    layer_names = {hf_name: meta_name for meta_name, hf_name in _LAYER.items()}
    top_names = {hf_name: meta_name for meta_name, hf_name in _TOP.items()}
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    named: Tensors = {}
    for name, tensor in (tensors | {"lm_head.weight": head}).items():
        stem = name.removesuffix(".weight")
        if not stem.startswith("model.layers."):
            named[f"{top_names[stem]}.weight"] = tensor
            continue
        _, _, layer, kind = stem.split(".", 3)
        if kind == "self_attn.q_proj":
            tensor = interleaved(tensor, config.num_heads)
        elif kind == "self_attn.k_proj":
            tensor = interleaved(tensor, config.num_kv_heads)
        named[f"layers.{layer}.{layer_names[kind]}.weight"] = tensor
    return named


def _params(config: ModelConfig) -> dict[str, Any]:
    rope = config.ropes[0]
    scaled = rope.kind == "llama3"
    known = rope.kind == "default"
    if scaled:
        known = dict(_SCALED) == {key: rope.get(key) for key in _SCALED}
    has_bias = config.qkv_bias or config.o_bias or config.mlp_bias
    if (
        config.raw["model_type"] != "llama"
        or has_bias
        or not known
        or config.head_dim * config.num_heads != config.hidden_size
    ):
        raise UserError(
            "Meta's format has a place for Llama only: no biases, heads that fill the width, plain "
            "or Llama 3's rotary embedding. Convert to hf instead."
        )
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm.eps,
        "rope_theta": rope.theta,
        "max_seq_len": config.max_positions,
        **_feed_forward(config),
    }
    return params | (
        {"use_scaled_rope": True, "rope_scaling_factor": rope.get("factor")} if scaled else {}
    )


def _feed_forward(config: ModelConfig) -> dict[str, Any]:
    """Return the two numbers from which Meta's code computes the feed-forward width."""
    base = int(2 * 4 * config.hidden_size / 3)
    for multiple in (4096, 1024, 256, 1):
        exact = config.intermediate_size / base, (config.intermediate_size + 0.5) / base
        for factor in (None, 1.2, 1.3, 1.4, 1.5, *exact):
            width = base if factor is None else int(factor * base)
            if -(-width // multiple) * multiple == config.intermediate_size:
                sizes = {"multiple_of": multiple, "ffn_dim_multiplier": factor}
                return {key: value for key, value in sizes.items() if value is not None}
    raise AssertionError(config.intermediate_size)
