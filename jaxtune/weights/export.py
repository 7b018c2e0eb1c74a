"""The verified export: an adapter directory takes its name only once its reload computes what was trained."""

import importlib.util
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.lora import LoRAParam
from jaxtune.core.errors import RunFailure
from jaxtune.core.files import new_directory, write_text
from jaxtune.models.decoder import CausalLM
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter, write_adapter
from jaxtune.weights.rows import rows
from jaxtune.weights.source import Source

# Largest difference of logits, relative to the largest logit. A reload by this program runs the same code on the same numbers;
# PEFT runs PyTorch's kernels, in float32, which sum in another order.
SAME, PEFT = 1e-6, 1e-4

TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969 two people walked on the Moon; 3.14159 is close to pi.",
    "def add(a, b):\n    return a + b\n",
)


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        tokens: tokens of text.
        largest_logit: the largest absolute logit.
        reload_difference: largest difference of logits, trained model against reload by this program.
        peft_difference: the same against PEFT computing in float32 on the base as it was stored here; None where it was not run.
        peft_note: why it was not run.

    """

    tokens: int
    largest_logit: float
    reload_difference: float
    peft_difference: float | None
    peft_note: str | None


def export_adapter(
    out: Path,
    model: CausalLM,
    source: Source,
    tokenizer: Any,
    texts: list[list[int]],
    mesh: Mesh,
    *,
    dtype: str,
    compute: str,
    replace: bool = False,
) -> Verification:
    """Write the adapter of `model` in PEFT's format, reload it into a fresh base, compare logits, and only then name it `out`.

    Args:
        out: the directory to make.
        model: the trained model.
        source: its base, read again for the comparison.
        tokenizer: saved with the adapter; may be None.
        texts: ids of the texts that are compared on.
        mesh: where the fresh base goes.
        dtype: storage dtype of the trained model's base.
        compute: its compute dtype.
        replace: whether an existing `out` is replaced.

    Raises:
        RunFailure: the reload does not compute the same; nothing is left at `out`.

    """
    batch = _pad(texts)
    trained = logits(model, batch)
    with new_directory(out, replace=replace) as staging:
        write_adapter(staging, model, source.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        fresh = load_model(source, mesh, dtype=dtype, compute=compute)
        attach(fresh, open_adapter(staging), mesh)
        top = float(np.abs(trained).max())
        difference = float(np.abs(logits(fresh, batch) - trained).max())
        if not difference <= SAME * top:
            raise RunFailure(
                f"The exported adapter computes something else: logits differ by {difference:.2e} (largest {top:.1f}). Not written."
            )
        note = _why_not_peft(source)
        against_peft = None if note else _compare_with_peft(fresh, staging, source, batch)
        result = Verification(int((batch[1] > 0).sum()), top, difference, against_peft, note)
        write_text(staging / "README.md", _card(source, result))
    return result


def logits(model: CausalLM, batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Float32 logits of the texts' tokens, padding left out, [tokens, vocab]."""
    graph, state = nnx.split(model)
    out = jax.jit(lambda state, ids, segments: nnx.merge(graph, state)(ids, segment_ids=segments))(state, *batch)
    return np.asarray(out)[batch[1] > 0]


def as_dict(result: Verification) -> dict[str, Any]:
    """The verification for `--json` and the report."""
    return asdict(result)


def _pad(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(texts), max(map(len, texts)))
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)], segments[row, : len(text)] = text, 1
    return ids, segments


def _why_not_peft(source: Source) -> str | None:
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    import psutil

    size = sum(int(np.prod(tensor.shape)) for tensor in source.tensors().values()) * 4
    free = psutil.virtual_memory().available
    return f"a float32 copy of the base needs {size / 1e9:.0f} GB of memory" if size * 1.5 > free else None


def _compare_with_peft(fresh: CausalLM, adapter: Path, source: Source, batch: tuple[np.ndarray, np.ndarray]) -> float:
    """Largest difference of float32 logits between the reloaded model and PEFT's.

    Raises:
        RunFailure: they differ by more than rounding.

    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    fresh.compute_dtype = jnp.dtype(jnp.float32)
    ours = logits(fresh, batch)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages among themselves
        base = AutoModelForCausalLM.from_pretrained(**(source.transformers() or {}), dtype=torch.float32, trust_remote_code=False)
        stored = _stored(fresh)
        for name, weight in base.named_parameters():  # the base that was trained on may have been kept in fewer bits
            weight.copy_(weight.to(getattr(torch, stored[name])))
        peft = PeftModel.from_pretrained(base, adapter, cache_dir=scratch).eval()
        ids, mask = (torch.from_numpy(part.astype(np.int64)) for part in batch)
        theirs = peft(input_ids=ids, attention_mask=mask).logits.float().numpy()[batch[1] > 0]
    difference, top = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    if not difference <= PEFT * top:
        raise RunFailure(
            f"PEFT computes something else with the exported adapter: logits differ by {difference:.2e} (largest {top:.1f}). Not written."
        )
    return difference


def _stored(model: CausalLM) -> dict[str, str]:
    """The dtype in which each tensor of the base is kept, by Hugging Face's names."""
    base = nnx.state(model, lambda path, variable: isinstance(variable, nnx.Param) and not isinstance(variable, LoRAParam))
    leaves = (variable.get_value() for _, variable in nnx.to_flat_state(base))
    return {name: leaf.dtype.name for row, leaf in zip(rows(base, model.config), leaves, strict=True) for name in row.names}


def _card(source: Source, result: Verification) -> str:
    found = source.transformers() or {}
    base = f'"{source.name}"'
    if "gguf_file" in found:
        base = f'"{found["pretrained_model_name_or_path"]}", gguf_file="{found["gguf_file"]}"'
    peft = f"{result.peft_difference:.1e} by PEFT" if result.peft_difference is not None else f"PEFT not run ({result.peft_note})"
    return f"""---
library_name: peft
base_model: {source.name}
---
A LoRA adapter made by jaxtune, in PEFT's format.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/of/this/directory")
```

Verified before it was written: over {result.tokens} tokens of text, logits up to {result.largest_logit:.1f} differ from the trained
model's by {result.reload_difference:.1e} when reloaded by jaxtune, {peft}.
"""
