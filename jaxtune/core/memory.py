"""What a compiled program takes of a device's memory."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler counts them.

    Attributes:
        argument: weights, state and batch.
        output: results.
        alias: results that take the place of arguments.
        temp: everything between.

    """

    argument: int
    output: int
    alias: int
    temp: int

    @classmethod
    def of(cls, program: Any) -> "Memory | None":
        """Of a program of JAX; None where its platform does not tell."""
        found = program.memory_analysis()
        if found is None:
            return None
        sizes = (getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp"))
        return cls(*sizes)

    @property
    def peak(self) -> int:
        """Bytes at most: arguments, results that do not replace them, and temporaries, as if all were there at once."""
        return self.argument + self.output - self.alias + self.temp
