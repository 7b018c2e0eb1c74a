"""What is true of a configuration key, declared on its field."""

from enum import Enum


class Trait(Enum):
    """A property of a key; on a section's field it holds for every key of the section.

    Attributes:
        RESUMABLE: a run continues with another value: the key alters how the numbers are computed
            or kept, or how many there are, not the numbers.
        KEEPS_START: the model before training, and so its evaluation, is the same for every value.

    """

    RESUMABLE = "resumable"
    KEEPS_START = "keeps start"
