"""What a deployment sets for routing, and what a single request may change of it. Validated values, no logic."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

if TYPE_CHECKING:
    from lorauter.catalog.catalog import Catalog
    from lorauter.catalog.index import TaskSubset

TopK = Annotated[int, Field(ge=1, le=64)]
Temperature = Annotated[FiniteFloat, Field(gt=0, le=100)]
Examples = Annotated[int, Field(ge=0, le=16)]
Names = Annotated[frozenset[str], Field(strict=False)]  # any collection of strings will do

_NAME_BYTES = 80  # of a name in a set, beside its characters

Preset = Literal["default", "paper"]
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {
        "rerank": False,
        "composition": "tasks",
        "top_k": 3,
        "temperature": 0.2,
        "fallback": False,
        "examples": 0,
    },
}
"""What each preset changes of the defaults: "paper" is the recipe of LORAUTER (arXiv 2601.21795)."""


class RoutingConfig(BaseModel):
    """The settings of a router.

    Attributes:
        preset: the settings that those given here change.
        rerank: order the retrieved tasks by the catalog's reranker, else by cosine similarity.
        candidates: tasks retrieved by cosine similarity, for the reranker and the composition.
        composition: "utility" mixes the adapters of the largest expected utility over the retrieved tasks; "tasks"
            the best adapter of each of the nearest tasks.
        selection: what an adapter is worth for a task: its score on all of the task's examples ("mean"), or with
            more weight on those that resemble the query ("similar"); for tasks that adapters were matched to.
        top_k: adapters in a mixture, or tasks that lend one, at most.
        temperature: divides utilities, or the tasks' scores, before the softmax that makes them weights; the smaller,
            the more the best prevails.
        softening: the temperature of a query of no known task is so many times as high: sharp where it is clear what
            to use, soft where it is not.
        num_tasks: how many of the nearest tasks a decision reports.
        fallback: answer with the base model alone what is stranger than nearly every query of a task that the
            catalog lacks.
        sure: where the catalog has states, a query's own is looked at unless the chance of its first task is as high
            without; 0 looks at none, 1 at all.
        examples: the nearest examples of the first task that go before a query, as turns of its chat, at most: where
            the task is beyond doubt and the catalog knows that they help it (`lorauter.catalog.shown`). None shows as
            many as this was found out with, 0 none.
        examples_sure: the chance of the first task from which it is beyond doubt.
        examples_tokens: that they take together, at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset = "default"
    rerank: bool = True
    candidates: Annotated[int, Field(ge=1, le=1000)] = 64
    composition: Literal["utility", "tasks"] = "utility"
    selection: Literal["mean", "similar"] = "mean"
    top_k: TopK = 16
    temperature: Temperature = 0.05
    softening: Annotated[FiniteFloat, Field(ge=1, le=100)] = 3.0
    num_tasks: Annotated[int, Field(ge=1, le=1000)] = 10
    fallback: bool = True
    sure: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.7
    examples: Examples | None = None
    examples_sure: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.9
    examples_tokens: Annotated[int, Field(ge=1)] = 1024

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, Mapping) else None
        return {**PRESETS[preset], **given} if isinstance(preset, str) and preset in PRESETS else given

    def asked(self, options: RoutingOptions) -> RoutingConfig:
        """The settings for a request: those of the preset that it asks for, or these."""
        return self if options.preset is None else _of_preset(self, options.preset)


@lru_cache(maxsize=64)
def _of_preset(config: RoutingConfig, preset: Preset) -> RoutingConfig:
    """A preset, that looks at as many tasks as a router does."""
    return RoutingConfig(
        preset=preset,
        candidates=config.candidates,
        num_tasks=config.num_tasks,
        selection=config.selection,
        examples_sure=config.examples_sure,
        examples_tokens=config.examples_tokens,
    )


class RoutingOptions(BaseModel):
    """What one request may ask of the router."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    preset: Annotated[Preset | None, Field(description="route by this recipe in place of the router's settings")] = None
    top_k: Annotated[TopK | None, Field(description="in place of the router's")] = None
    temperature: Annotated[Temperature | None, Field(description="in place of the router's")] = None
    exclude_tasks: Annotated[
        Names, Field(description="route as if these were not in the catalog; unknown names exclude nothing")
    ] = frozenset()
    exclude_adapters: Annotated[Names, Field(description="do not use these; unknown names exclude nothing")] = (
        frozenset()
    )
    allow_adapters: Annotated[Names | None, Field(description="use no others")] = None
    constrain: Annotated[
        bool, Field(description="hold the answer to the likeliest task's `answers`, if it has any")
    ] = False
    examples: Annotated[
        Examples | None,
        Field(description="show so many of the likeliest task's examples before a lone question, where they help it"),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, Mapping) else given

    def plain(self) -> dict[str, Any]:
        """What is asked of the router, without what else a request says beside it."""
        return {name: getattr(self, name) for name in RoutingOptions.model_fields}

    def among(self, catalog: Catalog) -> TaskSubset | None:
        """The tasks to search; None is all of them."""
        return None

    def allows(self, adapter: str) -> bool:
        """Whether an adapter may be used."""
        return adapter not in self.exclude_adapters and (self.allow_adapters is None or adapter in self.allow_adapters)

    @property
    def allows_all(self) -> bool:
        """Whether every adapter may be used."""
        return not self.exclude_adapters and self.allow_adapters is None

    def may_show(self, declared: Collection[str]) -> bool:
        """Whether the examples of a task may be shown for which these adapters were made, or which has this name."""
        return True

    @property
    def nbytes(self) -> int:
        """What its names take, about: a request may have as many as its body has room for."""
        names = (*self.exclude_tasks, *self.exclude_adapters, *(self.allow_adapters or ()))
        return sum(map(len, names)) + _NAME_BYTES * len(names)

    @property
    def adapters_key(self) -> Hashable:
        """The same for options that allow the same adapters."""
        return self.exclude_adapters, self.allow_adapters
