"""What a deployment sets for routing, and what a single request may change of it. Validated values, no logic."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

TopK = Annotated[int, Field(ge=1, le=64)]
Temperature = Annotated[FiniteFloat, Field(gt=0, le=100)]
Names = Annotated[frozenset[str], Field(strict=False)]  # any collection of strings will do


class RoutingConfig(BaseModel):
    """The settings of a router.

    Attributes:
        top_k: how many of the nearest tasks lend their adapter to the mixture.
        temperature: divides the cosine similarities before the softmax that makes them weights; the smaller, the
            more the nearest task's adapter prevails.
        num_tasks: how many of the nearest tasks a decision reports.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    top_k: TopK = 3
    temperature: Temperature = 0.2
    num_tasks: Annotated[int, Field(ge=1, le=1000)] = 10


class RoutingOptions(BaseModel):
    """What one request may ask of the router.

    Attributes:
        top_k: in place of the router's.
        temperature: in place of the router's.
        exclude_tasks: tasks to route as if they were not in the catalog; unknown names exclude nothing.
        exclude_adapters: adapters not to use; unknown names exclude nothing.
        allow_adapters: the only adapters to use; None allows all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    top_k: TopK | None = None
    temperature: Temperature | None = None
    exclude_tasks: Names = frozenset()
    exclude_adapters: Names = frozenset()
    allow_adapters: Names | None = None

    @field_validator("exclude_tasks", "exclude_adapters", mode="before")
    @classmethod
    def _none_excludes_nothing(cls, value: Any) -> Any:
        return frozenset() if value is None else value

    def allows(self, adapter: str) -> bool:
        """Whether an adapter may be used."""
        return adapter not in self.exclude_adapters and (self.allow_adapters is None or adapter in self.allow_adapters)
