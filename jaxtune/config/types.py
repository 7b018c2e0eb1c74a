"""The types of keys."""

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Beta = Annotated[float, Field(ge=0, lt=1)]
AxisSize = Annotated[int, Field(ge=-1)]
Names = str | Annotated[list[str], Field(min_length=1)]
SplitShare = Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")] | Annotated[float, Field(gt=0, lt=1)]
LayerChoice = Annotated[str, Field(pattern=r"^last:[1-9]\d*$")] | list[Index]
