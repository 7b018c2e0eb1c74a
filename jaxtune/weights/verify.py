"""Compare what two models compute: logits on a few texts, here and in PyTorch."""

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
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.models.decoder import CausalLM
from jaxtune.weights.source import Source

# Largest difference of logits, relative to the largest logit. A reload by jaxtune runs the same
# code on the same numbers. PyTorch's kernels sum in another order, and so do merged weights.
SAME, TORCH = 1e-6, 1e-4

TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969 two people walked on the Moon; 3.14159 is close to pi.",
    "def add(a, b):\n    return a + b\n",
)
_IDS = 24


@dataclass(frozen=True)
class Texts:
    """What models are compared on.

    Attributes:
        ids: [texts, longest], int32.
        segments: the same shape, 1 for a token and 0 for padding.

    """

    ids: np.ndarray
    segments: np.ndarray

    @property
    def tokens(self) -> int:
        """Return the number of tokens, without padding."""
        return int((self.segments > 0).sum())


@dataclass(frozen=True)
class Comparison:
    """The differences between a model and what was written of it.

    Attributes:
        tokens: tokens of text.
        largest_logit: the largest absolute logit.
        reload_difference: largest difference of logits, original against reload by jaxtune.
        torch_difference: the same, reload against PyTorch in float32; None where it was not run.
        torch_note: why it was not run.
        divergence: mean KL divergence of the next token's distribution, in nats, of the reload from
            the original; None where no number was rounded.
        same_choice: share of the tokens after which both hold the same token for the likeliest.

    """

    tokens: int
    largest_logit: float
    reload_difference: float
    torch_difference: float | None
    torch_note: str | None
    divergence: float | None = None
    same_choice: float | None = None

    @classmethod
    def of(
        cls,
        before: np.ndarray,
        after: np.ndarray,
        texts: Texts,
        torch_difference: float | None,
        torch_note: str | None,
        *,
        is_rounded: bool = False,
    ) -> "Comparison":
        """Compare the logits before and after, float32 [tokens, vocab]; `is_rounded` says that the
        reload has other numbers than the original.
        """
        # The last row is no text.
        size = texts.tokens - int(texts.segments[-1].sum())
        distances = _divergences(before[:size], after[:size]) if is_rounded else (None, None)
        return cls(
            texts.tokens,
            float(np.abs(before).max()),
            float(np.abs(after - before).max()),
            torch_difference,
            torch_note,
            *distances,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for `--json` and the report."""
        return asdict(self)


def _divergences(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Return the mean KL divergence and the share of equal choices; logits [tokens, vocab]."""
    divergences, equal = [], 0
    for first, second in zip(before, after, strict=True):
        p, q = (_log_softmax(row.astype(np.float64)) for row in (first, second))
        divergences.append(float(np.sum(np.exp(p) * (p - q))))
        equal += int(first.argmax() == second.argmax())
    return float(np.mean(divergences)), equal / len(divergences)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def pad_texts(rows: list[list[int]]) -> Texts:
    """Return rows of ids as one batch."""
    shape = (len(rows), max(map(len, rows)))
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, text in enumerate(rows):
        ids[row, : len(text)], segments[row, : len(text)] = text, 1
    return Texts(ids, segments)


def sample_texts(tokenizer: Tokenizer | None, vocab_size: int) -> Texts:
    """Return a few texts (random ids where there is no tokenizer), and a row of the last tokens,
    which may have been added to the model.
    """
    last = list(range(max(0, vocab_size - _IDS), vocab_size))
    if tokenizer is None:
        random = np.random.default_rng(0).integers(0, vocab_size, (len(TEXT), _IDS))
        return pad_texts([*random.tolist(), last])
    return pad_texts([*(tokenizer(text)["input_ids"] for text in TEXT), last])


def logits(model: CausalLM, texts: Texts) -> np.ndarray:
    """Return float32 logits of the texts' tokens without padding, [tokens, vocab]."""
    graph, state = nnx.split(model)
    out = jax.jit(lambda state, ids, segments: nnx.merge(graph, state)(ids, segment_ids=segments))(
        state, texts.ids, texts.segments
    )
    return fetch(out)[texts.segments > 0]


def why_not_torch(source: Source, *packages: str) -> str | None:
    """Return why PyTorch cannot compute the same here; None where it can."""
    missing = [name for name in ("torch", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if is_multiprocess():
        return "the run has several processes"
    if source.pretrained_arguments() is None:
        return "transformers does not read this format"
    import psutil

    size = sum(int(np.prod(tensor.shape)) for tensor in source.tensors().values()) * 4
    free = psutil.virtual_memory().available
    if size * 1.5 > free:
        return f"a float32 copy of the base needs {size / 1e9:.0f} GB of memory"
    return None


@contextmanager
def torch_model(source: Source) -> Iterator[tuple[Any, str]]:
    """Yield transformers' model in float32, and a folder that is removed afterwards."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages among themselves
        model = AutoModelForCausalLM.from_pretrained(
            **(source.pretrained_arguments() or {}),
            attn_implementation="eager",  # the others drop Gemma 2's soft-cap
            dtype=torch.float32,
            trust_remote_code=False,
        )
        if model.config.vocab_size != (size := source.config_json()["vocab_size"]):
            model.resize_token_embeddings(size, mean_resizing=False)
        yield model, scratch


def torch_logits(model: Any, texts: Texts) -> np.ndarray:
    """Return what `logits` does, computed by PyTorch."""
    import torch

    ids, mask = (torch.from_numpy(part.astype(np.int64)) for part in (texts.ids, texts.segments))
    return model(input_ids=ids, attention_mask=mask).logits.float().numpy()[texts.segments > 0]


def check_logits(ours: np.ndarray, reference: np.ndarray, program: str) -> float:
    """Return the largest difference between our logits and those of another program.

    Raises:
        RunError: they differ by more than rounding.

    """
    difference, largest = float(np.abs(ours - reference).max()), float(np.abs(ours).max())
    if not difference <= TORCH * largest:
        raise RunError(
            f"{program} computes something else: logits differ by {difference:.2e} "
            f"(largest {largest:.1f}). Not written."
        )
    return difference


def compare_with_transformers(
    written: Source, ours: np.ndarray, texts: Texts
) -> tuple[str | None, float | None]:
    """Compare our logits on a model that was written with those of transformers.

    Returns:
        Why they were not compared, and the largest difference; one of them is None.

    Raises:
        RunError: they differ by more than rounding.

    """
    if note := why_not_torch(written):
        return note, None
    with torch_model(written) as (model, _):
        reference = torch_logits(model.eval(), texts)
        return None, check_logits(ours, reference, "transformers, on what was written,")
