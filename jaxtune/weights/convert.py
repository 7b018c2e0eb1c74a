"""A model in another program's format, with its adapter merged if it has one; it takes its name
only once, read again, it is the same.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxtune.core.dtypes import DTYPES
from jaxtune.core.errors import RunError, UserError, listed
from jaxtune.core.files import new_directory, new_file, refuse_existing, write_json, write_text
from jaxtune.models.config import ModelConfig
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.card import card
from jaxtune.weights.formats import hf_directory, meta, orbax
from jaxtune.weights.formats.gguf import models as gguf_models
from jaxtune.weights.formats.gguf import tokenizer as gguf_tokenizer
from jaxtune.weights.formats.gguf import writer as gguf_writer
from jaxtune.weights.load import checked, load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import Adapter, attach
from jaxtune.weights.source import GGUFFile, OverriddenSource, Source, resolve
from jaxtune.weights.tensors import LazyTensor, Tensors
from jaxtune.weights.verify import (
    SAME,
    TORCH,
    Comparison,
    Texts,
    against_transformers,
    logits,
    texts_of,
)

FORMATS = ("hf", "gguf", "meta", "orbax")


def convert_model(
    out: Path,
    source: Source,
    to: str,
    mesh: Mesh,
    *,
    dtype: str | None = None,
    adapter: Adapter | None = None,
    tokenizer: Any = None,
    about: str = "",
    replace: bool = False,
) -> Comparison:
    """Write a model, read it again, and only if it is the same name it `out`.

    The same means: the architecture, every number of every tensor (after rounding to `dtype`), and
    the logits. Where an adapter is merged, the merged weights in float32 compute what base and
    adapter compute side by side.

    Args:
        out: the directory to make; for `gguf` also a file that ends in .gguf.
        source: the model.
        to: one of FORMATS.
        mesh: where the models that are compared go.
        dtype: of the weights: float32, bfloat16, float16, for gguf also q8_0; by default each
            tensor's own.
        adapter: to be merged in float32.
        tokenizer: the one that goes with the model; by default the source's.
        about: more text for the model card.
        replace: whether an existing directory `out` is replaced.

    Raises:
        UserError: a format that has no place for this model, or `out` exists.
        RunError: what was written is not the same; nothing is left at `out`.

    """
    _check_arguments(out, to, dtype, replace)
    config, tensors = checked(source)
    raw, tokenizer = source.config_json(), tokenizer or source.tokenizer()
    texts = texts_of(tokenizer, config.vocab_size)
    before = _computed(source, adapter, mesh, texts)
    if adapter:
        _check_merged(source, tensors, adapter, mesh, texts, before)
        tensors, raw = merged(tensors, adapter, raw)
    name = source.name.rpartition("/")[2].removesuffix(".gguf")
    if to == "gguf":
        dtype = dtype or tensors["model.embed_tokens.weight"].dtype.name
        expected = _gguf_rounded(tensors, from_hf(raw, source.name), dtype)
    else:
        expected = (
            tensors
            if dtype is None
            else {key: tensor.astype(DTYPES[dtype]) for key, tensor in tensors.items()}
        )
        raw = _with_dtype(raw, expected)
    with _place(out, to, f"{name}-{dtype}.gguf", replace) as path:
        if to == "gguf":
            found = _gguf_tokenizer(source, raw, tokenizer)
            gguf_writer.write_gguf(path, tensors, raw, found, name, str(dtype))
        else:
            _write(path, source, raw, expected, to, tokenizer)
        written = resolve(str(path))
        _check_same(OverriddenSource(source.name, source.path, source, raw, expected), written)
        after = _computed(written, None, mesh, texts)
        note, torch_difference = (
            against_transformers(written, after, texts) if to == "hf" else (f"not for {to}", None)
        )
        result = Comparison.of(before, after, texts, torch_difference, note)
        exact = adapter is None and _same_numbers(tensors, expected)
        if not np.isfinite(after).all() or (
            exact and not result.reload_difference <= SAME * result.largest_logit
        ):
            raise RunError(
                "The model that was written computes something else: logits differ by "
                f"{result.reload_difference:.2e}. Not written."
            )
        folder = path.parent if path.suffix == ".gguf" else path
        write_text(folder / "README.md", card(source, to, result, about, adapter is not None))
    return result


@contextmanager
def _place(out: Path, to: str, name: str, replace: bool) -> Iterator[Path]:
    """Where to write: a directory; for gguf a file of this name in one, or the very file."""
    if to == "gguf" and out.suffix == ".gguf":
        with new_file(out) as path:
            yield path
    else:
        with new_directory(out, replace=replace) as staging:
            yield staging / name if to == "gguf" else staging


def _computed(source: Source, adapter: Adapter | None, mesh: Mesh, texts: Texts) -> np.ndarray:
    model = load_model(source, mesh, compute="float32")
    if adapter:
        attach(model, adapter, mesh)
    return logits(model, texts)


def _check_arguments(out: Path, to: str, dtype: str | None, replace: bool) -> None:
    if to not in FORMATS:
        raise UserError(f"The format {to!r} is not supported; supported are {listed(FORMATS)}.")
    allowed = gguf_writer.FORMATS if to == "gguf" else DTYPES
    if dtype is not None and dtype not in allowed:
        raise UserError(
            f"The dtype {dtype!r} is not supported for {to}; supported are {listed(allowed)}."
        )
    if not replace:
        refuse_existing(out)


def _check_merged(
    source: Source, tensors: Tensors, adapter: Adapter, mesh: Mesh, texts: Texts, wanted: np.ndarray
) -> None:
    """The merged weights, not yet rounded, compute what base and adapter compute side by side.

    Raises:
        RunError: they do not.

    """
    wide, raw = merged(tensors, adapter, source.config_json(), np.dtype("float32"))
    found = _computed(
        OverriddenSource(source.name, source.path, source, raw, wide), None, mesh, texts
    )
    difference, top = float(np.abs(found - wanted).max()), float(np.abs(wanted).max())
    if not difference <= TORCH * top:
        raise RunError(
            f"The merged weights compute something else: logits differ by {difference:.2e} "
            f"(largest {top:.1f}). Not written."
        )


def _write(
    staging: Path, source: Source, raw: dict[str, Any], tensors: Tensors, to: str, tokenizer: Any
) -> None:
    if to == "meta":
        meta.write_directory(staging, tensors, raw)
    else:
        (hf_directory if to == "hf" else orbax).write_directory(staging, tensors)
        write_json(staging / "config.json", raw)
        if generation := source.generation_config():
            write_json(staging / "generation_config.json", generation)
    _copy_tokenizer(staging, source, tokenizer)


def _copy_tokenizer(staging: Path, source: Source, tokenizer: Any) -> None:
    """The source's own files where it has some, byte by byte, else the tokenizer as transformers
    saves it.
    """
    files = source.tokenizer_files()
    for file in files:
        shutil.copyfile(file, staging / file.name)
    if not files and tokenizer is not None:
        tokenizer.save_pretrained(staging)


def _gguf_tokenizer(source: Source, raw: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    if isinstance(source, GGUFFile):
        return {
            key: value
            for key, value in source.file.metadata.items()
            if key.startswith("tokenizer.")
        }
    return (
        gguf_tokenizer.metadata(tokenizer, raw["vocab_size"], source.stop_ids())
        if tokenizer is not None
        else {}
    )


def _gguf_rounded(tensors: Tensors, config: ModelConfig, dtype: str) -> Tensors:
    """What will be read from the file: as stored, with what llama.cpp changes done and undone."""
    gguf_writer.check_expressible(config)
    return gguf_models.round_trip(
        tensors, config, lambda tensor, name: gguf_writer.stored(tensor, name, dtype)
    )


def _with_dtype(raw: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """`config.json` with the dtype that most numbers have, where it is new or another one."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + math.prod(tensor.shape)
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    return raw | {key: max(sizes, key=lambda name: sizes[name])}


def _check_same(expected: Source, written: Source) -> None:
    """The architecture and every number.

    Raises:
        UserError: the format could not hold the architecture.
        RunError: a tensor is another one.

    """
    ours, theirs = (
        from_hf(source.config_json(), str(source.config_path)) for source in (expected, written)
    )
    if odd := [
        field.name
        for field in fields(ours)
        if field.compare and not _close(getattr(ours, field.name), getattr(theirs, field.name))
    ]:
        differences = listed(
            f"{name} {getattr(theirs, name)} instead of {getattr(ours, name)}" for name in odd
        )
        raise UserError(
            f"The format has no place for this model; read again it would have {differences}. Not "
            "written."
        )
    wanted, found = expected.tensors(), checked(written)[1]
    if odd := sorted(wanted.keys() ^ found.keys()):
        raise RunError(
            f"Read again, the tensors {listed(odd)} are missing or too many. Not written."
        )
    if odd := [name for name in wanted if not _equal(wanted[name], found[name])]:
        raise RunError(
            f"Read again, the tensors {listed(odd)} are not what was to be written. Not written."
        )


def _same_numbers(tensors: Tensors, expected: Tensors) -> bool:
    """Whether nothing was rounded."""
    return all(
        tensors[name] is tensor or _equal(tensors[name], tensor)
        for name, tensor in expected.items()
    )


def _equal(ours: LazyTensor, theirs: LazyTensor) -> bool:
    pairs = zip(ours.blocks(), theirs.blocks(), strict=False)
    return ours.shape == theirs.shape and all(
        np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs
    )


def _close(ours: Any, theirs: Any) -> bool:
    """Equality up to the rounding of a float32, which is what some formats keep."""
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))
    if is_dataclass(ours) and type(ours) is type(theirs):
        return all(
            _close(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours)
        )
    return ours == theirs
