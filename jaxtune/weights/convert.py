"""A model in another format, with its adapter merged if it has one; the export takes its name only
once a reload is the same model.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxtune.core.errors import RunError, UserError, listed
from jaxtune.core.files import (
    Replacement,
    new_directory,
    new_file,
    refuse_existing,
    write_text,
)
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.card import model_card
from jaxtune.weights.formats.format import ModelContents, ModelFormat
from jaxtune.weights.formats.registry import get_model_format
from jaxtune.weights.load import check_source, load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import Adapter, attach
from jaxtune.weights.source import OverriddenSource, Source, resolve
from jaxtune.weights.tensors import LazyTensor, Tensors
from jaxtune.weights.verify import (
    SAME,
    TORCH,
    Comparison,
    Texts,
    logits,
    sample_texts,
)
from jaxtune.weights.vocabulary import stop_ids_for, tokenizer_files_for, tokenizer_for


def convert_model(
    out: Path,
    source: Source,
    to: str,
    mesh: Mesh,
    *,
    dtype: str | None = None,
    adapter: Adapter | None = None,
    tokenizer: Tokenizer | None = None,
    stop_ids: Iterable[int] = (),
    about: str = "",
    replace: Replacement | None = None,
) -> Comparison:
    """Write a model in another format; it is named `out` only if, read again, it is the same.

    The same means: the architecture, every number of every tensor (after rounding to `dtype`), and
    the logits. Where an adapter is merged, the merged weights in float32 compute what base and
    adapter compute side by side.

    Args:
        out: the directory to make; for a format that is a single file also the file.
        source: the model.
        to: the name of a format that holds a whole model.
        mesh: where the models that are compared go.
        dtype: of the weights, one of the format's `dtypes`; by default each tensor's own.
        adapter: to be merged in float32.
        tokenizer: the one that goes with the model; by default the adapter's, else the source's.
        stop_ids: tokens that end an answer, beside those that the source and the adapter name.
        about: more text for the model card.
        replace: whether and how an existing directory `out` is replaced.

    Raises:
        UserError: a format that has no place for this model, or `out` exists.
        RunError: what was written is not the same; nothing is left at `out`.

    """
    model_format = get_model_format(to)
    _check_arguments(out, model_format, dtype, replace)
    config, tensors = check_source(source)
    raw, tokenizer = source.config_json(), tokenizer or tokenizer_for(source, adapter)
    texts = sample_texts(tokenizer, config.vocab_size)
    before = _logits_of(source, adapter, mesh, texts)
    if adapter:
        _check_merged(source, tensors, adapter, mesh, texts, before)
        tensors, raw = merged(tensors, adapter, raw)
    contents = ModelContents(
        source,
        raw,
        tensors,
        dtype,
        tokenizer,
        tokenizer_files_for(source, adapter),
        sorted({*stop_ids_for(source, adapter), *stop_ids}),
    )
    rounded, expected_raw = (
        model_format.round_trip(contents),
        model_format.config_read_back(contents),
    )
    expected = OverriddenSource(source.name, source.path, source, expected_raw, rounded)
    is_exact = adapter is None and _same_numbers(tensors, expected.weights)
    with _staging(out, model_format, contents, replace) as path:
        model_format.write(path, contents)
        written = resolve(str(path))
        _check_same(expected, written)
        after = _logits_of(written, None, mesh, texts)
        note, torch_difference = model_format.compare_outside(contents, written, after, texts)
        comparison = Comparison.of(
            before, after, texts, torch_difference, note, is_rounded=not is_exact
        )
        if not np.isfinite(after).all() or (
            is_exact and not comparison.reload_difference <= SAME * comparison.largest_logit
        ):
            raise RunError(
                "The model that was written computes something else: logits differ by "
                f"{comparison.reload_difference:.2e}. Not written."
            )
        folder = path.parent if model_format.suffix else path
        card = model_card(model_format, source, comparison, about, is_merged=adapter is not None)
        write_text(folder / "README.md", card)
    return comparison


@contextmanager
def _staging(
    out: Path, model_format: ModelFormat, contents: ModelContents, replace: Replacement | None
) -> Iterator[Path]:
    """Yield where to write: a directory, or for a format of one file a file."""
    if model_format.suffix and out.suffix == model_format.suffix:
        with new_file(out) as path:
            yield path
    else:
        with new_directory(out, replace=replace) as staging:
            yield staging / model_format.file_name(contents) if model_format.suffix else staging


def _logits_of(source: Source, adapter: Adapter | None, mesh: Mesh, texts: Texts) -> np.ndarray:
    model = load_model(source, mesh, compute="float32")
    if adapter:
        attach(model, adapter, mesh)
    return logits(model, texts)


def _check_arguments(
    out: Path, model_format: ModelFormat, dtype: str | None, replace: Replacement | None
) -> None:
    if dtype is not None and dtype not in model_format.dtypes:
        raise UserError(
            f"The dtype {dtype!r} is not supported for {model_format.name}; supported are "
            f"{listed(model_format.dtypes)}."
        )
    if replace is None:
        refuse_existing(out)


def _check_merged(
    source: Source, tensors: Tensors, adapter: Adapter, mesh: Mesh, texts: Texts, before: np.ndarray
) -> None:
    """Check that the merged weights, not yet rounded, compute what base and adapter compute side by
    side.

    Raises:
        RunError: they do not.

    """
    wide, raw = merged(tensors, adapter, source.config_json(), np.dtype("float32"))
    merged_source = OverriddenSource(source.name, source.path, source, raw, wide)
    after = _logits_of(merged_source, None, mesh, texts)
    difference, largest = float(np.abs(after - before).max()), float(np.abs(before).max())
    if not difference <= TORCH * largest:
        raise RunError(
            f"The merged weights compute something else: logits differ by {difference:.2e} "
            f"(largest {largest:.1f}). Not written."
        )


def _check_same(expected: Source, written: Source) -> None:
    """Check the architecture and every number.

    Raises:
        UserError: the format could not hold the architecture.
        RunError: a tensor is another one.

    """
    before, after = (
        from_hf(source.config_json(), str(source.config_path)) for source in (expected, written)
    )
    if differing := [
        f"{field.name} {getattr(after, field.name)} instead of {getattr(before, field.name)}"
        for field in fields(before)
        if field.compare and not _close(getattr(before, field.name), getattr(after, field.name))
    ]:
        raise UserError(
            "The format has no place for this model; read again it would have "
            f"{listed(differing)}. Not written."
        )
    original, reread = expected.tensors(), check_source(written)[1]
    if odd := sorted(original.keys() ^ reread.keys()):
        raise RunError(
            f"Read again, the tensors {listed(odd)} are missing or too many. Not written."
        )
    if odd := [name for name in original if not _equal(original[name], reread[name])]:
        raise RunError(
            f"Read again, the tensors {listed(odd)} are not what was to be written. Not written."
        )


def _same_numbers(tensors: Tensors, expected: Tensors) -> bool:
    """Return whether nothing was rounded."""
    return all(
        tensors[name] is tensor or _equal(tensors[name], tensor)
        for name, tensor in expected.items()
    )


def _equal(expected: LazyTensor, actual: LazyTensor) -> bool:
    pairs = zip(expected.blocks(), actual.blocks(), strict=False)
    return expected.shape == actual.shape and all(
        np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs
    )


def _close(expected: Any, actual: Any) -> bool:
    """Return whether two values are equal up to float32, which is what some formats keep."""
    if isinstance(expected, float) and isinstance(actual, int | float):
        return math.isclose(expected, actual, rel_tol=1e-6)
    if isinstance(expected, tuple) and isinstance(actual, tuple):
        return len(expected) == len(actual) and all(map(_close, expected, actual))
    if is_dataclass(expected) and type(expected) is type(actual):
        return all(
            _close(getattr(expected, field.name), getattr(actual, field.name))
            for field in fields(expected)
        )
    return expected == actual
