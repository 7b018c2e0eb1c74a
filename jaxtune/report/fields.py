"""Fields of a run directory as the types that a page needs: anyone may have written its files, so a
field may hold anything.
"""

import math
from typing import Any


def as_object(value: Any) -> dict[str, Any]:
    """Return an object of JSON; empty where the value is none."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return an array of JSON; empty where the value is none."""
    return value if isinstance(value, list) else []


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in an array of JSON."""
    return [item for item in as_list(value) if isinstance(item, dict)]


def as_number(value: Any) -> float | None:
    """Return a finite number; None where the value is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def scientific(value: Any) -> str:
    """Return a number with one digit after the point, and what is no number as a text."""
    number = as_number(value)
    return str(value) if number is None else f"{number:.1e}"
