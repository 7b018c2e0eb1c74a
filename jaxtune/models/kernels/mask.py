"""Which tokens see which."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int


class Mask(NamedTuple):
    """Which keys a query may see: those of its own segment, at its own position or before, within
    the window if there is one.

    Rotary positions give the order, so a packed row needs nothing but its segments and positions.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    window: Int[Array, ""] | None = None

    def allowed(self) -> Bool[Array, "B T S"]:
        """Return the mask as booleans."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        near = distance >= 0
        if self.window is not None:
            near &= distance < self.window
        return near & (self.key_segments[:, None, :] == self.query_segments[:, :, None])
