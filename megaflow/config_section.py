"""What every section of the config is made of: the base class, kinds of numbers, help for error messages."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Weight = Annotated[Decimal, Field(ge=0, le=10**9)]
Epochs = Annotated[Decimal, Field(gt=0, le=10**9)]
Positive = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=2**20)]


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(value: int, choices: list[int]) -> str:
    """The choices next below and next above `value`, for an error message."""
    below = [c for c in choices if c <= value][-1:]
    above = [c for c in choices if c > value][:1]
    return " or ".join(str(c) for c in below + above)


def looks_at_files(info: ValidationInfo) -> bool:
    """Whether files that a config names must be there; a plan of a run elsewhere says `{"files": False}`."""
    return info.context is None or info.context.get("files", True)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, field docstrings are the help."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False, frozen=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        values = value if isinstance(value, list) else [value]
        if field.annotation is not bool and any(isinstance(one, bool) for one in values):
            raise ValueError("true or false where another kind of value is meant; give that, in quotes if it is a name")
        return value
