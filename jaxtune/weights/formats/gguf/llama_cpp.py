"""What llama.cpp computes from a file: the program that GGUF is written for (package xllamacpp)."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtune.core.errors import RunError, UserError
from jaxtune.weights.formats.gguf import llama_cpp_worker
from jaxtune.weights.verify import TEXT, Texts

_LIKELIEST, _CONTEXT, _SECONDS = 20, 256, 3600
# Largest mean difference of a likely token's log-probability, by the type of the matrices.
# llama.cpp looks Gemma's activation up in a table of 16 bits, and rounds what a matrix is
# multiplied with to the matrix's own type, or to 8 bits where that has fewer.
_TOLERANCES = {"float32": 3e-3, "float16": 0.1, "bfloat16": 0.3}
_QUANTIZED_TOLERANCE = 1.0


@dataclass(frozen=True)
class Answers:
    """What llama.cpp says.

    Attributes:
        tokens: the ids of each text.
        likeliest: after each prompt the log-probabilities of the likeliest tokens, the first first.

    """

    tokens: list[list[int]]
    likeliest: list[dict[int, float]]


def ask_llama_cpp(
    path: Path, prompts: list[list[int]], texts: Sequence[str] = (), *, context: int = _CONTEXT
) -> Answers:
    """Return what llama.cpp computes from a file.

    Args:
        path: a GGUF file.
        prompts: ids of tokens, for what comes next.
        texts: to be tokenized, with the tokens that belong at the ends of a text.
        context: what llama.cpp has room for; it chooses LongRoPE's divisors by it.

    Raises:
        UserError: llama.cpp cannot load the file.
        RunError: it did not run, for another reason.

    """
    question = {
        "path": str(path),
        "texts": list(texts),
        "prompts": prompts,
        "context": context,
        "count": _LIKELIEST,
    }
    worker = subprocess.run(
        [sys.executable, str(llama_cpp_worker.__file__)],
        input=json.dumps(question),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_SECONDS,
        check=False,
    )
    if worker.returncode == 0:
        said = json.loads(worker.stdout)
        return Answers(said["tokens"], [dict(row) for row in said["likeliest"]])
    for line in worker.stderr.splitlines():
        for mark in ("error loading model: ", "GGML_ASSERT"):
            if mark in line:
                reason = line[line.index(mark) :].removeprefix("error loading model: ").strip()
                raise UserError(f"llama.cpp cannot load what was written: {reason}. Not written.")
    lines = worker.stderr.strip().splitlines() or [f"it ended with {worker.returncode}"]
    raise RunError(lines[-1][:200])


def compare_with_llama_cpp(
    path: Path, ours: np.ndarray, texts: Texts, dtype: str, *, with_tokenizer: bool
) -> tuple[str | None, float | None]:
    """Compare our logits with what llama.cpp computes from the same file, at the end of each text.

    Args:
        path: a GGUF file.
        ours: float32 logits of the texts' tokens, [tokens, vocab].
        texts: what both computed.
        dtype: of the file's matrices.
        with_tokenizer: whether the texts' tokens are compared too.

    Returns:
        Why they were not compared, and the largest difference of a likely token's log-probability;
        one of them is None.

    Raises:
        UserError: llama.cpp cannot load the file.
        RunError: it computes something else.

    """
    if note := _why_not(path):
        return note, None
    lengths = texts.segments.sum(axis=1)
    prompts = [row[:size].tolist() for row, size in zip(texts.ids, lengths, strict=True)]
    try:
        answers = ask_llama_cpp(path, prompts, TEXT if with_tokenizer else ())
    except (RunError, OSError, subprocess.TimeoutExpired) as error:
        return f"it did not run: {error}", None
    for text, ids, expected_ids in zip(TEXT, answers.tokens, prompts, strict=False):
        if ids != expected_ids:
            raise RunError(
                f"llama.cpp makes other tokens of {text[:24]!r} with what was written: {ids} "
                f"instead of {expected_ids}. Not written."
            )
    logits = ours[np.cumsum(lengths) - 1].astype(np.float64)
    highest = logits.max(axis=1, keepdims=True)
    expected = logits - highest
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    differences = [
        abs(value - expected[row, token])
        for row, answer in enumerate(answers.likeliest)
        for token, value in answer.items()
    ]
    mean = float(np.mean(differences))
    if not mean <= _TOLERANCES.get(dtype, _QUANTIZED_TOLERANCE):
        raise RunError(
            "llama.cpp computes something else from what was written: log-probabilities differ by "
            f"{mean:.2e}. Not written."
        )
    return None, float(max(differences))


def _why_not(path: Path) -> str | None:
    """Return why llama.cpp cannot be asked here; None where it can."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "xllamacpp not installed"
    import psutil

    size, free = path.stat().st_size, psutil.virtual_memory().available
    if size * 1.2 > free:
        return f"it needs {size * 1.2 / 1e9:.0f} GB of memory"
    return None
