"""What a format says of itself: its name, the keys it is detected by, and how its rows are read.

The module of a format defines one `DataFormat` named `FORMAT`; see `registry`.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.sources.row import Row


@dataclass(frozen=True)
class DataFormat:
    """One way to write a row.

    Attributes:
        name: its value of `data.format`.
        matches: whether a row with these keys is written this way.
        read: the conversation in a row. The second argument says whether a prompt needs a
            completion (training and evaluation need one, generation does not). It raises
            `RowError` where a key is missing or of the wrong type.
        precedence: the format of the highest precedence is asked first where the keys of a row
            match several; among equals the order of the schema decides.

    """

    name: str
    matches: Callable[[Set[str]], bool]
    read: Callable[[Row, bool], Conversation]
    precedence: int = 0
