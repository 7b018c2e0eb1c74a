"""Comparing what two models compute: logits on a few texts, here and in PyTorch."""

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtune.core.distributed import fetch, is_multiprocess
from jaxtune.core.errors import RunError
from jaxtune.models.decoder import CausalLM
from jaxtune.weights.source import Source

# Largest difference of logits, relative to the largest logit. A reload by this program runs the
# same code on the same numbers; PyTorch runs other kernels, in float32, which sum in another order;
# so does a sum of merged weights.
SAME, TORCH = 1e-6, 1e-4

TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969 two people walked on the Moon; 3.14159 is close to pi.",
    "def add(a, b):\n    return a + b\n",
)
_IDS = 24


@dataclass(frozen=True)
class Texts:
    """What models are compared on: `ids` and `segments` [texts, longest], segments 0 where a row
    is padding.
    """

    ids: np.ndarray
    segments: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens, without padding."""
        return int((self.segments > 0).sum())


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        tokens: tokens of text.
        largest_logit: the largest absolute logit.
        reload_difference: largest difference of logits, original against reload by this program.
        torch_difference: the same, reload against PyTorch computing in float32; None where it was
            not run.
        torch_note: why it was not run.

    """

    tokens: int
    largest_logit: float
    reload_difference: float
    torch_difference: float | None
    torch_note: str | None

    @classmethod
    def of(
        cls,
        before: np.ndarray,
        after: np.ndarray,
        texts: Texts,
        torch_difference: float | None,
        torch_note: str | None,
    ) -> "Comparison":
        """The comparison of the logits before and after."""
        return cls(
            texts.tokens,
            float(np.abs(before).max()),
            float(np.abs(after - before).max()),
            torch_difference,
            torch_note,
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the report."""
        return asdict(self)


def padded(rows: list[list[int]]) -> Texts:
    """Rows of ids as one batch."""
    shape = (len(rows), max(map(len, rows)))
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, text in enumerate(rows):
        ids[row, : len(text)], segments[row, : len(text)] = text, 1
    return Texts(ids, segments)


def texts_of(tokenizer: Any, vocab_size: int) -> Texts:
    """A few texts, or where there is no tokenizer a few rows of tokens, and the last tokens,
    which may have been added.
    """
    last = list(range(max(0, vocab_size - _IDS), vocab_size))
    if tokenizer is None:
        return padded(
            [*np.random.default_rng(0).integers(0, vocab_size, (len(TEXT), _IDS)).tolist(), last]
        )
    return padded([*(tokenizer(text)["input_ids"] for text in TEXT), last])


def logits(model: CausalLM, texts: Texts) -> np.ndarray:
    """Float32 logits of the texts' tokens, padding left out, [tokens, vocab]."""
    graph, state = nnx.split(model)
    out = jax.jit(lambda state, ids, segments: nnx.merge(graph, state)(ids, segment_ids=segments))(
        state, texts.ids, texts.segments
    )
    return fetch(out)[texts.segments > 0]


def why_not_torch(source: Source, *packages: str) -> str | None:
    """Why PyTorch cannot compute the same here, if it cannot."""
    missing = [name for name in ("torch", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if is_multiprocess():
        return "the run has several processes"
    if source.transformers() is None:
        return "transformers does not read this format"
    import psutil

    size = sum(int(np.prod(tensor.shape)) for tensor in source.tensors().values()) * 4
    free = psutil.virtual_memory().available
    return (
        f"a float32 copy of the base needs {size / 1e9:.0f} GB of memory"
        if size * 1.5 > free
        else None
    )


@contextmanager
def torch_model(source: Source) -> Iterator[tuple[Any, str]]:
    """`(transformers' model in float32, a folder that is removed afterwards)`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages among themselves
        where = {
            **(source.transformers() or {}),
            "attn_implementation": "eager",
        }  # the others drop Gemma 2's soft-cap
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, trust_remote_code=False
        )
        if model.config.vocab_size != (size := source.config_json()["vocab_size"]):
            model.resize_token_embeddings(size, mean_resizing=False)
        yield model, scratch


def torch_logits(model: Any, texts: Texts) -> np.ndarray:
    """Like `logits`, by PyTorch."""
    import torch

    ids, mask = (torch.from_numpy(part.astype(np.int64)) for part in (texts.ids, texts.segments))
    return model(input_ids=ids, attention_mask=mask).logits.float().numpy()[texts.segments > 0]


def difference(ours: np.ndarray, theirs: np.ndarray, whose: str) -> float:
    """Largest difference of logits.

    Raises:
        RunError: they differ by more than rounding.

    """
    found, top = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    if not found <= TORCH * top:
        raise RunError(
            f"{whose} computes something else: logits differ by {found:.2e} (largest {top:.1f}). "
            "Not written."
        )
    return found


def against_transformers(
    written: Source, ours: np.ndarray, texts: Texts
) -> tuple[str | None, float | None]:
    """`(why not, largest difference)` of transformers' logits on a model that was written.

    Raises:
        RunError: they differ by more than rounding.

    """
    if note := why_not_torch(written):
        return note, None
    with torch_model(written) as (model, _):
        return None, difference(
            ours, torch_logits(model.eval(), texts), "transformers, on what was written,"
        )
