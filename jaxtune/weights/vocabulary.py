"""A model with more tokens than it came with: new rows of embedding and head are initialized to
the mean of the trained rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from jaxtune.adapters.inject import EMBEDDING, HEAD
from jaxtune.core.errors import UserError, listed
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.weights.generation_config import (
    GENERATION_CONFIG,
    read_generation_config,
    token_ids,
)
from jaxtune.weights.peft import CONFIG, COPY, PREFIX, Adapter
from jaxtune.weights.source import OverriddenSource, Source
from jaxtune.weights.tensors import Index, LazyTensor, Tensors
from jaxtune.weights.tokenizer_files import load_tokenizer, tokenizer_files

_MATRICES = (f"{EMBEDDING}.weight", f"{HEAD}.weight")


@dataclass(frozen=True)
class ResizedSource(OverriddenSource):
    """A source with further rows in its embedding and head.

    Attributes:
        new_tokenizer: the tokenizer that has the new tokens; None where only rows were added.
        new_ids: ids whose rows are the mean of the others; some may lie within the original's
            unused rows.

    """

    new_tokenizer: Tokenizer | None = None
    new_ids: tuple[int, ...] = ()

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return self.base.tokenizer() if self.new_tokenizer is None else self.new_tokenizer

    def tokenizer_files(self) -> list[Path]:
        """See Source."""
        return self.base.tokenizer_files() if self.new_tokenizer is None else []

    def pretrained_arguments(self) -> dict[str, str] | None:
        """Return the arguments for the original, which has to be resized."""
        return self.base.pretrained_arguments()

    def describe(self) -> str:
        """Return the tokens whose rows are new, for a message."""
        tokenizer, ids = self.new_tokenizer, list(self.new_ids)
        names = [] if tokenizer is None else tokenizer.convert_ids_to_tokens(ids)
        noun = "token" if len(names) == 1 else "tokens"
        return f"{len(names)} new {noun} ({listed(map(repr, names), 5)})"


def add_tokens(source: Source, tokens: Sequence[str]) -> Source:
    """Return the source with special tokens added to its tokenizer, and with rows for them.

    Args:
        source: the model, with a tokenizer.
        tokens: special tokens; those that model and tokenizer already have stay as they are. Where
            none is new the source itself is returned.

    Raises:
        UserError: there is no tokenizer to add to.

    """
    from tokenizers import AddedToken

    if not tokens:
        return source
    tokenizer, size = source.tokenizer(), source.config_json()["vocab_size"]
    if tokenizer is None:
        raise UserError(
            f"{source.name} has no tokenizer, so no tokens can be added. Put its tokenizer files "
            "beside the weights."
        )
    vocab = tokenizer.get_vocab()
    missing = [token for token in dict.fromkeys(tokens) if vocab.get(token, size) >= size]
    if not missing:
        return source
    trained_rows = min(size, 1 + max(vocab.values()))
    added = [AddedToken(token, special=True, normalized=False) for token in missing]
    tokenizer.add_tokens(added, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(missing)
    new_size = max(size, 1 + max(ids))
    new_ids = tuple(sorted({*ids, *range(size, new_size)}))
    return _resize(source, new_size, new_ids, tokenizer, trained_rows=trained_rows)


def resize_for_adapter(source: Source, adapter: Adapter | None) -> Source:
    """Return the source with the rows and the tokenizer that an adapter was trained with, where
    these are more than its own.

    Raises:
        UserError: the adapter has rows for tokens that neither the base nor its tokenizer has.

    """
    if adapter is None:
        return source
    size = source.config_json()["vocab_size"]
    whole = {
        name.removeprefix(PREFIX).replace(COPY, ""): tensor
        for name, tensor in adapter.tensors.items()
    }
    whole = {name: tensor for name, tensor in whole.items() if name in _MATRICES}
    rows = max([size, *(tensor.shape[0] for tensor in whole.values())])
    ids = {token for _, ids in adapter.config.tokens for token in ids}
    new_size = max([rows, *(token + 1 for token in ids)])
    if new_size == size and not ids:
        return source
    tokenizer = load_tokenizer(adapter.path)
    known = rows if tokenizer is None else max(rows, 1 + max(tokenizer.get_vocab().values()))
    if new_size > max(known, rows + len(ids)):
        raise UserError(
            f"{adapter.path / CONFIG}: trainable_token_indices: there is no token {new_size - 1}; "
            f"the base has the tokens 0 to {size - 1}, and the adapter's tokenizer "
            f"{'none beyond' if known <= size else f'up to {known - 1}'}."
        )
    new_ids = tuple(range(size, new_size))
    return _resize(source, new_size, new_ids, tokenizer, trained_rows=size, whole=whole)


def cut_rows(source: Source, size: int) -> Source:
    """Return the source with only the first `size` rows of its embedding and head, or with all
    where it has no more; the rest is padding that names no token.
    """
    raw, tensors = source.config_json(), source.tensors()
    if raw["vocab_size"] <= size:
        return source
    cut = {
        name: LazyTensor(
            (size, *tensors[name].shape[1:]),
            tensors[name].dtype,
            partial(_first_rows, tensors[name], size),
            tensors[name].quantized,
            tensors[name].file,
        )
        for name in _MATRICES
        if name in tensors
    }
    return OverriddenSource(
        source.name, source.path, source, raw | {"vocab_size": size}, tensors | cut
    )


def _first_rows(tensor: LazyTensor, size: int, index: Index) -> np.ndarray:
    return tensor.read((slice(*index[0].indices(size)), *index[1:]))


def tokenizer_for(source: Source, adapter: Adapter | None) -> Tokenizer | None:
    """Return the tokenizer, with its chat template, that an adapter was trained with; the source's
    where the adapter has none.
    """
    return (load_tokenizer(adapter.path) if adapter else None) or source.tokenizer()


def tokenizer_files_for(source: Source, adapter: Adapter | None) -> list[Path]:
    """Return the files that `tokenizer_for` reads."""
    files = tokenizer_files(adapter.path) if adapter and load_tokenizer(adapter.path) else []
    return files or source.tokenizer_files()


def stop_ids_for(source: Source, adapter: Adapter | None) -> list[int]:
    """Return the tokens at which answers end: the source's, and those that an adapter's own
    `generation_config.json` names.

    Raises:
        UserError: the file names something else.

    """
    named = read_generation_config(adapter.path) if adapter else {}
    return sorted({*source.stop_ids(), *token_ids(named, "eos_token_id", GENERATION_CONFIG)})


def _resize(
    source: Source,
    size: int,
    new_ids: tuple[int, ...],
    tokenizer: Tokenizer | None,
    *,
    trained_rows: int,
    whole: Tensors | None = None,
) -> ResizedSource:
    """Return the source with `size` rows: the new ones are those of the `whole` matrices where
    these have that size, else the mean of the trained rows.
    """
    tensors, replacements = source.tensors(), whole or {}

    def new_rows(name: str) -> Callable[[], np.ndarray]:
        matrix = replacements.get(name, replacements.get(_MATRICES[0]))
        if matrix is not None and matrix.shape == (size, tensors[name].shape[1]):
            return cache(lambda: matrix.all()[list(new_ids)])
        return cache(lambda: _mean(tensors[name], trained_rows))

    resized = {
        name: _with_rows(tensors[name], size, new_ids, new_rows(name))
        for name in _MATRICES
        if name in tensors and len(tensors[name].shape) == 2
    }
    raw = source.config_json() | {"vocab_size": size}
    return ResizedSource(
        source.name, source.path, source, raw, tensors | resized, tokenizer, new_ids
    )


def _with_rows(
    tensor: LazyTensor, size: int, new_ids: tuple[int, ...], values: Callable[[], np.ndarray]
) -> LazyTensor:
    """Return the matrix with `size` rows; `values()` are those of `new_ids`, or one for all."""
    rows, width = tensor.shape

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        out = np.empty((stop - start, len(range(width)[index[1]])), tensor.dtype)
        old = max(0, min(stop, rows) - start)
        out[:old] = tensor.read((slice(start, start + old), index[1]))
        inside = [place for place, token in enumerate(new_ids) if start <= token < stop]
        if inside:
            new = np.broadcast_to(values(), (len(new_ids), width))
            out[[new_ids[place] - start for place in inside]] = new[inside, index[1]]
        return out

    return LazyTensor((size, width), tensor.dtype, read, tensor.quantized)


def _mean(tensor: LazyTensor, rows: int) -> np.ndarray:
    """Return the mean of a matrix's first rows."""
    total, left = np.zeros(tensor.shape[1], np.float64), rows
    for block in tensor.blocks():
        total += block[:left].sum(axis=0, dtype=np.float64)
        left = max(0, left - len(block))
    return (total / rows).astype(tensor.dtype)
