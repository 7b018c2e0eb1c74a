"""A model with more tokens than it came with: new rows of embedding and head begin at the mean
of the trained ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.adapters.inject import EMBEDDING, HEAD
from jaxtune.core.errors import UserError, listed
from jaxtune.weights.peft import COPY, PREFIX, Adapter
from jaxtune.weights.source import OverriddenSource, Source
from jaxtune.weights.tensors import Index, LazyTensor, Tensors
from jaxtune.weights.tokenizer_files import load_tokenizer

_MATRICES = (f"{EMBEDDING}.weight", f"{HEAD}.weight")


@dataclass(frozen=True)
class ResizedSource(OverriddenSource):
    """A source with further rows in its embedding and head.

    Attributes:
        words: the tokenizer that has the new tokens; None where only rows were added.
        fresh: ids whose rows are at the mean of the others; some may lie within the original's
            unused rows.

    """

    words: Any = None
    fresh: tuple[int, ...] = ()

    def tokenizer(self) -> Any | None:
        """See Source."""
        return self.base.tokenizer() if self.words is None else self.words

    def tokenizer_files(self) -> list[Path]:
        """See Source."""
        return self.base.tokenizer_files() if self.words is None else []

    def pretrained_arguments(self) -> dict[str, str] | None:
        """The original, which has to be resized."""
        return self.base.pretrained_arguments()

    def describe(self) -> str:
        """The tokens whose rows are new, for a message."""
        names = self.words.convert_ids_to_tokens(list(self.fresh)) if self.words else []
        noun = "token" if len(names) == 1 else "tokens"
        return f"{len(names)} new {noun} ({listed(map(repr, names), 5)})"


def with_tokens(source: Source, tokens: Sequence[str]) -> Source:
    """The source with special tokens added to its tokenizer, and with rows for them.

    Args:
        source: the model, with a tokenizer.
        tokens: new special tokens; those that model and tokenizer have already are left as they
            are.

    Returns:
        The source itself where no token is new.

    Raises:
        UserError: there is no tokenizer to add to.

    """
    from tokenizers import AddedToken

    if not tokens:
        return source
    words, size = source.tokenizer(), source.config_json()["vocab_size"]
    if words is None:
        raise UserError(
            f"{source.name} has no tokenizer, so no tokens can be added. Put its tokenizer files "
            "beside the weights."
        )
    known = words.get_vocab()
    wanted = [token for token in dict.fromkeys(tokens) if known.get(token, size) >= size]
    if not wanted:
        return source
    used = min(size, 1 + max(known.values()))
    words.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in wanted], special_tokens=True
    )
    new = words.convert_tokens_to_ids(wanted)
    needed = max(size, 1 + max(new))
    return _resized(source, needed, tuple(sorted({*new, *range(size, needed)})), used, words)


def resize_for_adapter(source: Source, adapter: Adapter | None) -> Source:
    """The source with the rows and the tokenizer that an adapter was trained with, where they
    are more than its own.
    """
    if adapter is None:
        return source
    size = source.config_json()["vocab_size"]
    ends = [1 + max(ids) for _, ids in adapter.config.tokens if ids]
    whole = {
        name.removeprefix(PREFIX).replace(COPY, ""): tensor
        for name, tensor in adapter.tensors.items()
    }
    whole = {name: tensor for name, tensor in whole.items() if name in _MATRICES}
    needed = max([size, *ends, *(tensor.shape[0] for tensor in whole.values())])
    if needed == size and not adapter.config.tokens:
        return source
    return _resized(
        source, needed, tuple(range(size, needed)), size, load_tokenizer(adapter.path), whole
    )


def tokenizer_for(source: Source, adapter: Adapter | None) -> Any | None:
    """The tokenizer an adapter was trained with, and with it its chat template; the source's
    where the adapter brings none.
    """
    return (load_tokenizer(adapter.path) if adapter else None) or source.tokenizer()


def _resized(
    source: Source,
    size: int,
    fresh: tuple[int, ...],
    used: int,
    words: Any,
    whole: Tensors | None = None,
) -> ResizedSource:
    """The grown source; where there are `whole` matrices of that size, the new rows are theirs
    instead of a mean.
    """
    tensors, found = source.tensors(), whole or {}

    def new(name: str) -> Callable[[], np.ndarray]:
        given = found.get(name, found.get(_MATRICES[0]))
        if given is not None and given.shape == (size, tensors[name].shape[1]):
            return cache(lambda: given.all()[list(fresh)])
        return cache(lambda: _mean(tensors[name], used))

    matrices = [name for name in _MATRICES if name in tensors and len(tensors[name].shape) == 2]
    changed = {name: _with_rows(tensors[name], size, fresh, new(name)) for name in matrices}
    raw = source.config_json() | {"vocab_size": size}
    return ResizedSource(source.name, source.path, source, raw, tensors | changed, words, fresh)


def _with_rows(
    tensor: LazyTensor, size: int, fresh: tuple[int, ...], values: Callable[[], np.ndarray]
) -> LazyTensor:
    """The matrix with `size` rows; `values()` are those of `fresh`, or one for all."""
    rows, width = tensor.shape

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        out = np.empty((stop - start, len(range(width)[index[1]])), tensor.dtype)
        old = max(0, min(stop, rows) - start)
        out[:old] = tensor.read((slice(start, start + old), index[1]))
        inside = [place for place, token in enumerate(fresh) if start <= token < stop]
        if inside:
            new = np.broadcast_to(values(), (len(fresh), width))
            out[[fresh[place] - start for place in inside]] = new[inside, index[1]]
        return out

    return LazyTensor((size, width), tensor.dtype, read, tensor.quantized)


def _mean(tensor: LazyTensor, used: int) -> np.ndarray:
    """The mean of a matrix's first rows."""
    total, left = np.zeros(tensor.shape[1], np.float64), used
    for block in tensor.blocks():
        total += block[:left].sum(axis=0, dtype=np.float64)
        left = max(0, left - len(block))
    return (total / used).astype(tensor.dtype)
