"""The adapters of a repository that a catalog may name: those that can be served, as far as their files say.

What `push` has put there was read then. Plain PEFT folders are read now. Whether an adapter fits the base model is for
the engine to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from lorauter.adapters.provenance import Composition
from lorauter.adapters.repository import MISNAMED, AdapterManifest, AdapterRepository, Report
from lorauter.errors import AdapterNotFound, AdapterRejected

_AT_ONCE = 4  # each is in memory while it is read


@dataclass(frozen=True)
class Pool:
    """What there is to serve.

    Attributes:
        versions: of each adapter.
        base_model: the names of their base models, as far as manifests say.
        left_out: the names of those that cannot be served.
        composed: of what, those that were composed.
    """

    versions: Mapping[str, str]
    base_model: str = ""
    left_out: frozenset[str] = frozenset()
    composed: Mapping[str, Composition] = field(default_factory=dict)


def read_pool(
    repository: AdapterRepository,
    report: Report,
    *,
    known: Pool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pool:
    """See which adapters there are, and which of them can be served.

    Args:
        report: is told which are left out and why, and what else is odd.
        known: those that were read before.
        progress: called with the number of adapters that were looked at, and of all.

    Raises:
        AdapterUnavailable, StoreError: the store fails.
    """

    known = known or Pool({})

    def look(name: str) -> tuple[AdapterManifest | AdapterRejected | None, tuple[str, ...]]:
        try:
            manifest, before = repository.manifest(name), known.versions.get(name)
            if before is not None and repository.is_same(name, before, manifest.version):
                return replace(manifest, version=before), ()  # a commit that did not concern it is no news
            if before == manifest.version or all(file.sha256 for file in manifest.files.values()):
                return manifest, ()
            weights = repository.load(manifest)
            return replace(manifest, provenance=weights.provenance), weights.warnings
        except AdapterNotFound:  # some other folder in the store
            return None, ()
        except AdapterRejected as error:
            return error, ()

    names = repository.names()
    manifests, left_out = [], []
    for name in repository.misnamed():
        report(f"left out: {AdapterRejected(MISNAMED, adapter=name)}")
    with ThreadPoolExecutor(_AT_ONCE) as workers:
        for done, (name, (found, warnings)) in enumerate(zip(names, workers.map(look, names), strict=True), start=1):
            progress(done, len(names))
            for warning in warnings:
                report(f"adapter {name!r}: {warning}")
            if isinstance(found, AdapterManifest):
                manifests.append(found)
            elif found is not None:
                left_out.append(name)
                report(f"left out: {found}")
    base_models = sorted({manifest.base_model for manifest in manifests} - {""})
    versions = {manifest.name: manifest.version for manifest in manifests}
    return Pool(versions, ", ".join(base_models), frozenset(left_out), _composed(manifests, known))


def _composed(manifests: Iterable[AdapterManifest], known: Pool) -> dict[str, Composition]:
    found = {}
    for manifest in manifests:
        before = known.composed.get(manifest.name) if known.versions.get(manifest.name) == manifest.version else None
        if composition := Composition.of_adapter(manifest.name, manifest.provenance) or before:
            found[manifest.name] = composition
    return found
