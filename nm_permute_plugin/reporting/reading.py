# SPDX-License-Identifier: Apache-2.0
"""Read what others have written as JSON: unknown fields are passed over, wrong ones not."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
"""A number of something: what a picture can hold."""


class Read(BaseModel):
    """A part of a JSON file."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


R = TypeVar("R", bound=Read)


def read_as(kind: type[R], content: Mapping[str, Any], where: str, remedy: str) -> R:
    """
    Read the content of a file.

    :param where: the file, for the error
    :param remedy: what to do about the error
    :raises ValueError: naming the file and the first field that is not as it must be
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{where} is damaged ({field}: {first['msg']}); {remedy}"
        ) from None
