# SPDX-License-Identifier: Apache-2.0
"""What all groups of settings have in common."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nm_permute_plugin.pruning.settings.errors import with_remedies


def refuse_unread(of: BaseModel, name: str, place: str, because: str) -> None:
    """Refuse a setting that differs from its default where nothing would read it."""
    value, default = getattr(of, name), type(of).model_fields[name].default
    if value != default:
        raise ValueError(
            f"{place}{name} is set, and nothing reads it with {because}; leave it out"
        )


class Frozen(BaseModel):
    """A group of settings that never changes, and refuses what it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )

    def __new__(cls, *given: object, **fields: object) -> "Frozen":
        """Refuse values without their names, of which pydantic says little."""
        if given:
            kind, names = cls.__name__, list(cls.model_fields)
            first = "method" if "method" in names else names[0]
            raise TypeError(
                f"{kind} takes its fields by name, and got {given[0]!r} without one: "
                f"write {kind}({first}=...)"
            )
        return super().__new__(cls)

    @model_validator(mode="wrap")
    @classmethod
    def _lead_to_remedies(cls, value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            # A modifier has fields of its host beside these, which no recipe names.
            own = next(
                kind
                for kind in cls.__mro__
                if issubclass(kind, Frozen)
                and kind.__module__.rpartition(".")[0] == __package__
            )
            raise with_remedies(error, cls, list(own.model_fields)) from None
