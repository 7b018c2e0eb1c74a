"""Export what was trained, verified: the directory takes its name only once its reload computes
the same.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.inject import exportable, portable
from jaxtune.adapters.method import AdapterParam
from jaxtune.core.distributed import fetch
from jaxtune.core.errors import RunError
from jaxtune.core.files import Replacement, new_directory, write_text
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.models.decoder import CausalLM
from jaxtune.models.kernels.quantized import QuantizedTensor
from jaxtune.weights.card import model_card
from jaxtune.weights.convert import convert_model
from jaxtune.weights.formats.peft import FORMAT as PEFT
from jaxtune.weights.generation_config import write_generation_config
from jaxtune.weights.load import check_source, load_model
from jaxtune.weights.mapping import leaf_mappings
from jaxtune.weights.peft import attach, open_adapter, write_adapter
from jaxtune.weights.source import OverriddenSource, Source
from jaxtune.weights.tensors import Index, LazyTensor, Tensors
from jaxtune.weights.tokenizer_files import save_tokenizer
from jaxtune.weights.verify import (
    SAME,
    Comparison,
    Texts,
    check_logits,
    logits,
    sample_texts,
    torch_logits,
    torch_model,
    why_not_torch,
)


def export_adapter(
    out: Path,
    model: CausalLM,
    source: Source,
    tokenizer: Tokenizer | None,
    texts: Texts,
    mesh: Mesh,
    *,
    dtype: str,
    compute: str,
    exact: bool = True,
    stop_ids: Iterable[int] = (),
    about: str = "",
    replace: Replacement | None = None,
) -> Comparison:
    """Write the adapter of `model` in PEFT's format; it is named `out` only if it computes the same
    logits when reloaded onto a fresh base.

    Args:
        out: the directory to make.
        model: the trained model.
        source: its base, read again for the comparison.
        tokenizer: saved with the adapter.
        texts: what the models are compared on.
        mesh: where the fresh base goes.
        dtype: storage dtype of the trained model's base.
        compute: its compute dtype.
        exact: with scales and ranks as trained; else as every program reads them (see
            `adapters.inject.portable`).
        stop_ids: tokens that end an answer, beside the base's; `generation_config.json` beside the
            adapter names them all, which PEFT does not read.
        about: more text for the model card.
        replace: whether and how an existing `out` is replaced.

    Raises:
        RunError: the reload does not compute the same; nothing is left at `out`.

    """
    model = exportable(model)
    if not exact:
        model = _portable(model, texts)
    trained = logits(model, texts)
    with new_directory(out, replace=replace) as staging:
        write_adapter(staging, model, source.name)
        save_tokenizer(staging, source.tokenizer_files(), tokenizer)
        write_generation_config(
            staging, source.generation_config(), {*source.stop_ids(), *stop_ids}
        )
        fresh = load_model(source, mesh, dtype=dtype, compute=compute)
        attach(fresh, open_adapter(staging), mesh)
        reloaded = logits(fresh, texts)
        note = why_not_torch(source, "peft")
        comparison = Comparison.of(trained, reloaded, texts, None, note)
        if not comparison.reload_difference <= SAME * comparison.largest_logit:
            raise RunError(
                "The exported adapter computes something else: logits differ by "
                f"{comparison.reload_difference:.2e} (largest {comparison.largest_logit:.1f}). "
                "Not written."
            )
        if note is None:
            difference = _compare_with_peft(fresh, staging, source, texts)
            comparison = Comparison.of(trained, reloaded, texts, difference, None)
        card = model_card(PEFT, source, comparison, about, is_merged=False)
        write_text(staging / "README.md", card)
    return comparison


def _portable(model: CausalLM, texts: Texts) -> CausalLM:
    """Return the model with a portable adapter, which computes the same in float32.

    Raises:
        RunError: it does not.

    """
    changed = portable(model)
    if changed is model:
        return model
    compute = model.compute_dtype
    model.compute_dtype = changed.compute_dtype = jnp.dtype(jnp.float32)
    check_logits(logits(model, texts), logits(changed, texts), "The portable adapter")
    model.compute_dtype = changed.compute_dtype = compute
    return changed


def export_weights(
    out: Path,
    model: CausalLM,
    source: Source,
    tokenizer: Tokenizer | None,
    mesh: Mesh,
    *,
    to: str = "hf",
    dtype: str | None = None,
    stop_ids: Iterable[int] = (),
    about: str = "",
    replace: Replacement | None = None,
) -> Comparison:
    """Write all weights of `model`, rounded to the dtypes of the base; the directory is named `out`
    only if a reload computes the same logits.

    Args:
        out: the directory to make.
        model: the trained model, without an adapter.
        source: its base, for the names, dtypes and configuration.
        tokenizer: saved with the weights.
        mesh: where the models that are compared go.
        to: the name of a format that holds a whole model.
        dtype: of the weights, instead of the base's.
        stop_ids: tokens that end an answer, beside the base's.
        about: more text for the model card.
        replace: whether and how an existing `out` is replaced.

    Raises:
        UserError: a format that has no place for the model.
        RunError: the reload does not compute the same; nothing is left at `out`.

    """
    config, base = check_source(source)
    trained, dtypes = _trained_tensors(model, base)
    texts = sample_texts(tokenizer, config.vocab_size)
    changed = OverriddenSource(source.name, source.path, source, source.config_json(), trained)
    model.compute_dtype = jnp.dtype(jnp.float32)
    before = logits(_rounded(model, dtypes), texts)
    after = logits(load_model(changed, mesh, compute="float32"), texts)
    difference, largest = float(np.abs(before - after).max()), float(np.abs(before).max())
    if not difference <= SAME * largest:
        raise RunError(
            "The weights to be written compute something else: logits differ by "
            f"{difference:.2e}. Not written."
        )
    return convert_model(
        out,
        changed,
        to,
        mesh,
        dtype=dtype,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        about=about,
        replace=replace,
    )


def _trained_tensors(model: CausalLM, base: Tensors) -> tuple[Tensors, list[np.dtype]]:
    """Return the tensors by Hugging Face's names, and the dtype of each leaf: that of the base's
    file, the widest where a stack has several.
    """
    tensors, dtypes = {}, []
    state = nnx.state(model, nnx.Param)
    for row, (_, variable) in zip(
        leaf_mappings(state, model.config), nnx.to_flat_state(state), strict=True
    ):
        with jax.numpy_dtype_promotion("standard"):
            dtype = np.dtype(jnp.result_type(*{base[name].dtype for name in row.names}))
        dtypes.append(dtype)
        for number, name in enumerate(row.names):
            shape = base[name].shape
            place = np.unravel_index(number, row.stack) if row.stack else ()
            read = partial(_slice, variable, place, shape)
            tensors[name] = LazyTensor(shape, np.dtype("float32"), read).astype(dtype)
    return tensors, dtypes


def _slice(
    variable: nnx.Variable, place: tuple[Any, ...], shape: tuple[int, ...], index: Index
) -> np.ndarray:
    """Return a part of one tensor of a leaf; beyond `shape` a leaf has padding."""
    leaf = jax.tree.map(lambda part: part[place], variable.get_value())
    return fetch(leaf.astype(jnp.float32)[: shape[0]][index])


def _rounded(model: CausalLM, dtypes: list[np.dtype]) -> CausalLM:
    """Return the model with each leaf rounded to the dtype it is written in."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    wide = (leaf.astype(jnp.float32) for leaf in leaves)
    rounded = [leaf.astype(dtype) for leaf, dtype in zip(wide, dtypes, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, rounded))


def _compare_with_peft(fresh: CausalLM, adapter: Path, source: Source, texts: Texts) -> float:
    """Return the largest difference of float32 logits between the reloaded model and PEFT's, on the
    base as it was stored here.

    Raises:
        RunError: they differ by more than rounding.

    """
    from peft import PeftModel

    fresh.compute_dtype = jnp.dtype(jnp.float32)
    ours = logits(fresh, texts)
    with torch_model(source) as (base, scratch):
        stored = _stored(fresh)
        # The base that was trained on may have been stored in fewer bits.
        for name, weight in base.named_parameters():
            if name in stored:
                weight.copy_(stored[name](weight))
        peft = PeftModel.from_pretrained(base, adapter, cache_dir=scratch).eval()
        return check_logits(ours, torch_logits(peft, texts), "PEFT, with the exported adapter,")


def _stored(model: CausalLM) -> dict[str, Callable[[Any], Any]]:
    """Return by Hugging Face's names what loading did to each tensor of the base: a rounding, or a
    quantization.
    """
    import torch

    base = nnx.state(
        model,
        lambda path, variable: (
            isinstance(variable, nnx.Param) and not isinstance(variable, AdapterParam)
        ),
    )
    stored: dict[str, Callable[[Any], Any]] = {}
    for row, (_, variable) in zip(
        leaf_mappings(base, model.config), nnx.to_flat_state(base), strict=True
    ):
        leaf = variable.get_value()
        for number, name in enumerate(row.names):
            if isinstance(leaf, QuantizedTensor):
                place = np.unravel_index(number, row.stack)
                stored[name] = partial(_dequantized, variable, place)
            else:
                dtype = getattr(torch, np.dtype(leaf.dtype).name)
                stored[name] = partial(torch.Tensor.to, dtype=dtype)
    return stored


def _dequantized(variable: nnx.Variable, place: tuple[Any, ...], weight: Any) -> Any:
    """Return what quantization made of a tensor of the base, for PyTorch."""
    import torch

    return torch.from_numpy(np.array(_slice(variable, place, tuple(weight.shape), (slice(None),))))
