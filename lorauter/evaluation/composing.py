"""Compositions as a step of the evaluation: of each task, with its own adapters and without, from a catalog's pool.

Whatever a regime takes away is no source: in-domain nothing, semi-OOD the task's own adapters. An unseen task (OOD) has
no composition, and others' are not used for it, as they may be made of what is taken away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorauter.adapters.provenance import Composition
from lorauter.adapters.weights import LoadAdapter, LoraWeights
from lorauter.errors import InvalidRequest
from lorauter.evaluation.regimes import REGIMES

if TYPE_CHECKING:
    from lorauter.catalog import Catalog
    from lorauter.compositions.config import ComposeConfig
    from lorauter.compositions.make import Progress

COMPOSED_REGIMES = REGIMES[:2]
_FILE = "composed.json"


@dataclass(frozen=True)
class ComposedFor:
    """A composition that beat the router's mixtures.

    Attributes:
        regime: whose adapters it is made of.
        sources: with their versions.
        folder: the PEFT adapter's.
    """

    name: str
    regime: str
    task: str
    sources: Mapping[str, str]
    folder: Path


def compose_regimes(
    catalog: Catalog,
    tasks: Collection[str],
    load: LoadAdapter,
    output: Path,
    *,
    own: Mapping[str, Collection[str]],
    model: str,
    device: str = "auto",
    config: ComposeConfig | None = None,
    progress: Progress = lambda done, total, what: None,
    report: Callable[[str], None] = lambda what: None,
) -> None:
    """Make the compositions of each regime in a folder; what is there is not made again.

    Args:
        own: adapters of each task that the regimes take away.

    Raises:
        As `lorauter.compositions.pool.compose_for`.
    """
    from lorauter.compositions.pool import compose_for

    rows = []
    for place, regime in enumerate(COMPOSED_REGIMES):
        barred = {task: own[task] if regime == REGIMES[1] else () for task in tasks}

        def name_of(task: str, regime: str = regime) -> str:
            return f"{task}.composed.{regime}"

        def told(done: int, total: int, what: str, before: int = place) -> None:
            progress(before * total + done, len(COMPOSED_REGIMES) * total, what)

        for made in compose_for(
            catalog, tasks, load, output / "made", model=model, device=device, config=config, barred=barred,
            name_of=name_of, progress=told, report=report,
        ):  # fmt: skip
            row = {"name": made.name, "regime": regime, "folder": str(made.folder.relative_to(output))}
            rows.append({**row, "holds": made.holds, **made.provenance.to_json()})
    (output / _FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read_composed(output: Path) -> list[ComposedFor]:
    """The compositions that hold, of a folder that `compose_regimes` wrote. Raises InvalidRequest."""
    try:
        rows = json.loads((output / _FILE).read_bytes())
        return [
            ComposedFor(
                row["name"],
                row["regime"],
                row["task"],
                {source["name"]: source["version"] for source in row["sources"]},
                output / row["folder"],
            )
            for row in rows
            if row["holds"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{output} holds no compositions: {error!r}; 'lorauter eval compose' makes them"
        ) from error


def with_composed(
    catalog: Catalog, composed: Sequence[ComposedFor], own: Mapping[str, Collection[str]]
) -> dict[str, Catalog]:
    """The catalog of each regime, with its compositions. What the regime takes away stands behind them."""
    from lorauter.adapters.repository import AdapterManifest
    from lorauter.catalog import with_adapter

    found = {}
    for regime in COMPOSED_REGIMES:
        manifests = []
        for one in (one for one in composed if one.regime == regime):
            beaten = {name: catalog.adapters[name] for name in own.get(one.task, ()) if name in catalog.adapters}
            of = {**beaten, **one.sources}
            provenance = {"task": one.task, "sources": [{"name": n, "version": v} for n, v in of.items()]}
            assert Composition.of_adapter(one.name, provenance) is not None
            manifests.append(AdapterManifest(one.name, "0" * 16, {}, provenance=provenance))
        found[regime] = with_adapter(catalog, *manifests) if manifests else catalog
    return found


def barred_in(regime: str, catalog: Catalog, own: Mapping[str, Collection[str]]) -> dict[str, frozenset[str]]:
    """Of each task the adapters that its queries may not use in a regime: what this takes away; and others'
    compositions, which are made of that too."""
    return {
        task: frozenset(
            () if regime == REGIMES[0] else {*of, *(name for name, c in catalog.composed.items() if c.task != task)}
        )
        for task, of in own.items()
    }


def composed_or(composed: Sequence[ComposedFor], load: LoadAdapter) -> LoadAdapter:
    """Reads compositions by their names, and all else as `load` does."""
    folders = {one.name: one.folder for one in composed}

    def read(name: str) -> LoraWeights:
        return LoraWeights.load(folders[name], name=name, version="0" * 16) if name in folders else load(name)

    return read
