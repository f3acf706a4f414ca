"""Changes of what is served, many at once: what `POST /v1/catalog/changes` takes, and what the catalog's editor makes.

    {"changes": [{"put_task": {...}}, {"remove_task": "name"}, {"put_adapter": "name"}, {"remove_adapter": "name"}]}

All of them are one version of the catalog, or none is. Their order says nothing, as no two may be of one thing. Knows
neither HTTP nor catalogs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lorauter.errors import InvalidRequest
from lorauter.tasks import Task

Kind = Literal["task", "adapter"]
MAX_CHANGES = 1000


@dataclass(frozen=True)
class Change:
    """One of them.

    Attributes:
        kind, name: of what is changed.
        remove: whether it goes; else it comes, or takes the place of the one of its name.
        task: of a task that comes. An adapter that comes is in the store.
    """

    kind: Kind
    name: str
    remove: bool = False
    task: Task | None = None


def parse_changes(raw: bytes, *, task: Callable[[Any], Task], adapter: Callable[[str], str]) -> tuple[Change, ...]:
    """Read a request's body.

    Args:
        task: makes a task of JSON; adapter: gives an adapter's name back. Either raises what is wrong with it.

    Raises:
        InvalidRequest: it is not as above, or two changes are of one thing.
        Exception: whatever `task` and `adapter` raise.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON: {error}") from error
    rows = body.get("changes") if isinstance(body, dict) and body.keys() == {"changes"} else None
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_CHANGES:
        raise InvalidRequest(f'send {{"changes": [...]}} with 1 to {MAX_CHANGES} changes', param="changes")
    changes = tuple(_change(row, i, task, adapter) for i, row in enumerate(rows))
    twice = [key for key, count in Counter((change.kind, change.name) for change in changes).items() if count > 1]
    if twice:
        kind, name = twice[0]
        raise InvalidRequest(f"{kind} {name!r} is changed twice; send one change of it", param="changes")
    return changes


def _change(row: Any, number: int, task: Callable[[Any], Task], adapter: Callable[[str], str]) -> Change:
    what, of = next(iter(row.items())) if isinstance(row, dict) and len(row) == 1 else (None, None)
    if what == "put_task":
        made = task(of)
        return Change("task", made.name, task=made)
    if what in ("remove_task", "put_adapter", "remove_adapter") and isinstance(of, str):
        if what == "remove_task":
            return Change("task", of, remove=True)
        return Change("adapter", adapter(of), remove=what == "remove_adapter")
    raise InvalidRequest(
        f"change {number}: got {json.dumps(row, ensure_ascii=False)[:200]}; a change is one of "
        '{"put_task": {...}}, {"remove_task": "name"}, {"put_adapter": "name"}, {"remove_adapter": "name"}',
        param=f"changes.{number}",
    )
