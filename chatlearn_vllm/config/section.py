"""What every section of a job's yaml has in common: frozen, strictly typed, documented fields."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A map of known keys.

    Strict: an int is taken where a float is wanted, nothing else is converted, so that
    `"False"` never becomes True. The string under a field is its documentation.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def list_to_tuple(value: Any) -> Any:
    """Take the list that a yaml file has where the frozen job has a tuple."""
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, Field(ge=0)]
"""0, 1, 2, ..."""
Positive = Annotated[int, Field(ge=1)]
"""1, 2, 3, ..."""
Limit = Annotated[int, Field(ge=-1)]
"""A count, or -1 for all of them."""
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
"""A part of a whole, in (0, 1]."""
Probability = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""Numpy's, which vLLM seeds, end at 2**32; replicas and stages add to theirs."""
Strings = Annotated[tuple[str, ...], BeforeValidator(list_to_tuple)]
Integers = Annotated[tuple[int, ...], BeforeValidator(list_to_tuple)]
"""yaml lists; tuples here, because the job is frozen."""
