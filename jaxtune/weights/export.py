"""Exports of an adapter, verified: the directory takes its name only once its reload computes what was trained."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.lora import LoRAParam
from jaxtune.core.errors import RunFailure
from jaxtune.core.files import new_directory, write_text
from jaxtune.models.decoder import CausalLM
from jaxtune.weights.card import card
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter, write_adapter
from jaxtune.weights.rows import rows
from jaxtune.weights.source import Source
from jaxtune.weights.verify import SAME, Comparison, Texts, difference, logits, torch_logits, torch_model, why_not_torch


def export_adapter(
    out: Path,
    model: CausalLM,
    source: Source,
    tokenizer: Any,
    texts: Texts,
    mesh: Mesh,
    *,
    dtype: str,
    compute: str,
    about: str = "",
    replace: bool = False,
) -> Comparison:
    """Write the adapter of `model` in PEFT's format, reload it into a fresh base, compare logits, and only then name it `out`.

    Args:
        out: the directory to make.
        model: the trained model.
        source: its base, read again for the comparison.
        tokenizer: saved with the adapter; may be None.
        texts: what the models are compared on.
        mesh: where the fresh base goes.
        dtype: storage dtype of the trained model's base.
        compute: its compute dtype.
        about: more text for the model card.
        replace: whether an existing `out` is replaced.

    Raises:
        RunFailure: the reload does not compute the same; nothing is left at `out`.

    """
    trained = logits(model, texts)
    with new_directory(out, replace=replace) as staging:
        write_adapter(staging, model, source.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        fresh = load_model(source, mesh, dtype=dtype, compute=compute)
        attach(fresh, open_adapter(staging), mesh)
        reloaded = logits(fresh, texts)
        note = why_not_torch(source, "peft")
        result = Comparison.of(trained, reloaded, texts, None, note)
        if not result.reload_difference <= SAME * result.largest_logit:
            raise RunFailure(
                f"The exported adapter computes something else: logits differ by {result.reload_difference:.2e} "
                f"(largest {result.largest_logit:.1f}). Not written."
            )
        if note is None:
            against = _compare_with_peft(fresh, staging, source, texts)
            result = Comparison.of(trained, reloaded, texts, against, None)
        write_text(staging / "README.md", card(source, "peft", result, about, adapted=True))
    return result


def _compare_with_peft(fresh: CausalLM, adapter: Path, source: Source, texts: Texts) -> float:
    """Largest difference of float32 logits between the reloaded model and PEFT's, on the base as it was stored here.

    Raises:
        RunFailure: they differ by more than rounding.

    """
    import torch
    from peft import PeftModel

    fresh.compute_dtype = jnp.dtype(jnp.float32)
    ours = logits(fresh, texts)
    with torch_model(source) as (base, scratch):
        stored = _stored(fresh)
        for name, weight in base.named_parameters():  # the base that was trained on may have been kept in fewer bits
            if name in stored:
                weight.copy_(weight.to(getattr(torch, stored[name])))
        peft = PeftModel.from_pretrained(base, adapter, cache_dir=scratch).eval()
        return difference(ours, torch_logits(peft, texts), "PEFT, with the exported adapter,")


def _stored(model: CausalLM) -> dict[str, str]:
    """The dtype in which each tensor of the base is kept, by Hugging Face's names."""
    base = nnx.state(model, lambda path, variable: isinstance(variable, nnx.Param) and not isinstance(variable, LoRAParam))
    leaves = (variable.get_value() for _, variable in nnx.to_flat_state(base))
    return {
        name: np.dtype(leaf.dtype).name for row, leaf in zip(rows(base, model.config), leaves, strict=True) for name in row.names
    }
