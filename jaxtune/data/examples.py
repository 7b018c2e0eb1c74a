"""All examples of a file, tokenised, with an account of what was cut or left out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError, listed
from jaxtune.data.chat import Example, tokenise
from jaxtune.data.formats import conversation
from jaxtune.data.sources import read_rows


@dataclass(frozen=True)
class Examples:
    """Examples ready for training: cut to length, each with at least one supervised token.

    Attributes:
        source: the file.
        items: the examples in the file's order.
        truncated: places of rows that lost supervised tokens to the cut.
        dropped: places of rows with nothing supervised (left).

    """

    source: str
    items: list[Example]
    truncated: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> np.ndarray:
        """Positions that each example takes in a row: up to the one that predicts its last supervised token."""
        return np.asarray([fed_length(item) for item in self.items], np.int64)

    def summary(self) -> dict[str, Any]:
        """Counts for the terminal, `env.json` and the report."""
        tokens = int(self.lengths.sum())
        return {
            "source": self.source,
            "rows": len(self.items) + len(self.dropped),
            "trained_rows": len(self.items),
            "truncated": len(self.truncated),
            "dropped": len(self.dropped),
            "tokens": tokens,
            "supervised_tokens": int(sum(item.supervised[1:].sum() for item in self.items)),
            "longest": int(self.lengths.max()),
        }


def fed_length(example: Example) -> int:
    """Tokens fed of an example: what follows its last supervised token can change no loss and is not fed."""
    return int(np.flatnonzero(example.supervised)[-1])


def prepare(path: str, tokenizer: Any, data: DataSection, progress: Callable[[int], None] | None = None) -> Examples:
    """Read, tokenise, mask and cut all rows of a file.

    Args:
        path: a JSON Lines file.
        tokenizer: the model's tokenizer.
        data: format, mask and length.
        progress: called with the number of rows done.

    Raises:
        UserError: a bad row, with its line; or no row has anything supervised.

    """
    items, truncated, dropped = [], [], []
    for number, row in enumerate(read_rows(path)):
        example = tokenise(tokenizer, conversation(row, data.format), data.train_on)
        kept = data.max_length + 1  # so many tokens are fed and, from the second on, predicted
        if example.supervised[kept:].any():
            truncated.append(row.place)
        example = Example(example.ids[:kept], example.supervised[:kept])
        if example.supervised[1:].any():
            items.append(example)
        else:
            dropped.append(row.place)
        if progress:
            progress(number + 1)
    if not items:
        raise UserError(
            f"{path}: no row has a supervised token within data.max_length = {data.max_length}. "
            f"Raise data.max_length, or give rows with an assistant's answer ({listed(dropped, 3)})."
        )
    return Examples(path, items, truncated, dropped)
