"""Who may do what: by endpoint and caller, in this one place. What handles a request asks no more.

An endpoint takes one of some roles. A change also takes the right to what it changes: a key that is limited to
adapters changes those alone, and of the tasks those that are served by none but its adapters, or that nothing serves
and that are called as its adapters are. It is told the same of a task that it may not change as of one that is not
there. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.access import Caller
from deployments.calls import CatalogDescription
from lorauter.catalog import Catalog
from lorauter.errors import PermissionDenied
from lorauter.keys import Role

HEALTH: Sequence[tuple[str, str]] = (("GET", "/healthz"), ("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"))

ROLES: Mapping[tuple[str, str], tuple[Role, ...]] = {
    ("POST", "/v1/chat/completions"): ("inference",),
    ("POST", "/v1/completions"): ("inference",),
    ("POST", "/v1/responses"): ("inference",),
    ("POST", "/v1/messages"): ("inference",),
    ("POST", "/v1/messages/count_tokens"): ("inference",),
    ("POST", "/v1/route"): ("inference",),
    ("POST", "/v1/embeddings"): ("inference",),
    ("POST", "/tokenize"): ("inference",),
    ("POST", "/detokenize"): ("inference",),
    ("GET", "/v1/models"): ("inference", "admin"),
    ("GET", "/v1/models/{model}"): ("inference", "admin"),
    ("GET", "/v1/tasks"): ("inference", "admin"),
    ("GET", "/v1/tasks/{name}"): ("inference", "admin"),
    ("GET", "/v1/adapters"): ("inference", "admin"),
    ("GET", "/v1/map"): ("inference", "admin"),
    ("GET", "/v1/access"): ("inference", "admin"),
    ("GET", "/version"): ("inference", "admin"),
    ("GET", "/load"): ("inference", "admin"),
    ("GET", "/metrics"): ("inference", "admin"),
    ("GET", "/v1/deployments"): ("inference", "admin"),
    ("GET", "/v1/catalog/versions"): ("admin",),
    ("GET", "/openapi.json"): (),
    ("GET", "/docs"): (),
    ("GET", "/"): (),
    ("GET", "/page/{digest}/{file}"): (),
    **dict.fromkeys(HEALTH, ()),
    ("POST", "/v1/adapters"): ("admin",),
    ("DELETE", "/v1/adapters/{name}"): ("admin",),
    ("POST", "/v1/tasks"): ("admin",),
    ("DELETE", "/v1/tasks/{name}"): ("admin",),
    ("POST", "/v1/catalog/changes"): ("admin",),
    ("POST", "/v1/catalog/current"): ("admin",),
    ("POST", "/v1/compositions"): ("admin",),
    ("GET", "/v1/compositions"): ("admin",),
    ("GET", "/v1/compositions/{id}"): ("admin",),
    ("POST", "/v1/compositions/{id}/cancel"): ("admin",),
    ("POST", "/v1/load_lora_adapter"): ("admin",),
    ("POST", "/v1/unload_lora_adapter"): ("admin",),
}
"""The roles of which an endpoint takes one; none where it needs no key."""

_OF_ALL = {("GET", "/metrics"), ("GET", "/v1/deployments"), ("GET", "/v1/catalog/versions")}
"""What tells of everything: a key for it has the role `admin` over all adapters."""


@dataclass(frozen=True)
class Change:
    """A change of what is served, as it was asked for.

    Attributes:
        make: makes it for a caller; returns what to answer.
        adapters, tasks: the names of what it adds, replaces or removes.
        whole: whether it may change anything.
    """

    make: Callable[[Caller], Awaitable[dict[str, Any]]]
    adapters: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    whole: bool = False


class Described(Protocol):
    """What tells what the catalog holds."""

    async def describe(self) -> CatalogDescription:
        """The tasks and adapters there are."""


def check_reading(caller: Caller, method: str, path: str) -> None:
    """Raise PermissionDenied unless a caller with one of an endpoint's roles may read what it tells."""
    if (method, path) in _OF_ALL and caller.key is not None and caller.audience != "operator":
        raise PermissionDenied(
            f"the key {caller.name!r} has not the role 'admin' over all adapters, of which this tells"
        )


async def check_change(caller: Caller, change: Change, service: Described) -> None:
    """Raise PermissionDenied unless a caller who may change something may change this, as far as is known here.

    What serves a task may have changed since: who makes the change asks `check_tasks` of the catalog that it changes.
    """
    if caller.permitted is None:
        return
    if change.whole:
        raise PermissionDenied(
            f"the key {caller.name!r} may change adapters called {_own(caller)} alone, and this changes all"
        )
    for name in change.adapters:
        if not caller.permits(name):
            raise PermissionDenied(
                f"the key {caller.name!r} may change adapters called {_own(caller)} alone, and not {name!r}"
            )
    if change.tasks:
        tasks = (await service.describe()).tasks
        check_tasks(
            caller, change.tasks, {task["id"]: [row["name"] for row in task.get("adapters", ())] for task in tasks}
        )


def check_tasks(caller: Caller, tasks: Sequence[str], serving: Mapping[str, Sequence[str]]) -> None:
    """Raise PermissionDenied unless a caller may change these tasks, given the adapters that serve those there are."""
    for name in tasks:
        if not all(map(caller.permits, serving.get(name) or [name])):
            raise PermissionDenied(
                f"the key {caller.name!r} may change a task only if it may use every adapter that serves it, and add "
                f"one only if it is called {_own(caller)}; {name!r} is neither"
            )


def serving(catalog: Catalog, tasks: Sequence[str]) -> dict[str, list[str]]:
    """The names of the adapters that serve each of these tasks, of those that are there."""
    places = {name: place for name in tasks if (place := catalog.place(name)) is not None}
    return {name: [a.name for a in catalog.entries[place].adapters] for name, place in places.items()}


def _own(caller: Caller) -> str:
    return " or ".join(caller.permitted or ()) or "nothing"
