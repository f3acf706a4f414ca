"""The catalog in use: exchanged for the published one while requests go on, and kept where that one is broken.

A thread reads the store's pointer to the current version every few seconds. Another version than the one in use is
loaded, verified, checked against the encoder and tried on a query before it takes over, between two requests. One
that fails is refused: that is logged once, told by `refused`, and tried again now and then, in case somebody mends it.
What was in use last is kept in a folder of this machine, for a start while the store is down or its catalog broken.
Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lorauter.adapters.store import DirectoryStore, ObjectStore
from lorauter.catalog.catalog import CURRENT_FILE, PROBE_TEXT, Catalog, current_version
from lorauter.catalog.parts import FOLDER, digest_of, key_of
from lorauter.defaults import home
from lorauter.encoder import Embeddings
from lorauter.errors import CatalogError, LorauterError, ServiceUnavailable, StoreError, StoreUnavailable
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions

logger = logging.getLogger("lorauter.catalog")

_RETRY_REFUSED_S = 30.0
_NOT_NOW = (StoreUnavailable, ServiceUnavailable)
Probe = Callable[[], tuple[Embeddings, str]]


def kept_folder(catalog: str) -> Path:
    """Where this machine keeps what it used last of a catalog, by its URI."""
    return home() / "catalogs" / f"used-{hashlib.sha256(catalog.encode()).hexdigest()[:16]}"


class LiveCatalog:
    """The published catalog, as far as it is sound.

    Args:
        store: where catalogs are published.
        config: routing settings.
        probe: the encoder's (d,) embedding of PROBE_TEXT and its name; whatever it raises delays a change.
        check: raises what is wrong with a catalog for this service.
        refresh_s: seconds between two looks at the store.
        keep: the folder for the catalog that was in use last.

    Raises:
        CatalogError, StoreError, ServiceUnavailable: the store has no catalog that can be used, and the folder has
            none either.
    """

    def __init__(
        self,
        store: ObjectStore,
        config: RoutingConfig,
        probe: Probe,
        *,
        check: Callable[[Catalog], None] = lambda _: None,
        refresh_s: float,
        keep: Path,
    ) -> None:
        self._store = store
        self._config = config
        self._probe = probe
        self._check = check
        self._refresh_s = refresh_s
        self._keep = keep
        self._refused_at = 0.0
        self._waiting = False
        self._stop = threading.Event()
        self.refused: tuple[str, str] | None = None
        """The published version that is not used, and why; None while the published one is in use."""
        published = None
        try:
            published = current_version(store)
            if published is None:
                raise CatalogError("nothing is published; run 'lorauter catalog build'", uri=store.uri)
            self.retriever = self._load(published)
        except Exception as error:  # noqa: BLE001 (it is raised again, unless the folder's stands in)
            try:
                self.retriever = self._retriever(Catalog.load(keep))
            except Exception:  # noqa: BLE001 (what is wrong with the published one is what has to be told)
                raise error from None
            logger.warning("what was in use last, catalog version %s, is so again", self.version)
            if not isinstance(error, _NOT_NOW):
                self._refuse(published or "none", error)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="catalog-watch")

    @property
    def version(self) -> str:
        """Of the catalog in use."""
        return self.retriever.catalog.version

    def start(self) -> None:
        """Look at the store from now on."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()

    def look(self) -> None:
        """Take over what is published, if it is another version and sound. Raises nothing."""
        published = "none"
        try:
            published = current_version(self._store) or published
            if published == self.version:
                self.refused = None
            elif self.refused is None or self.refused[0] != published or self._is_due():
                self.retriever = self._load(published)
                self.refused = None
                logger.info("catalog version %s is in use", published)
            self._waiting = False
        except _NOT_NOW as error:  # nothing is known to be wrong with what is published
            if not self._waiting:
                logger.warning("the published catalog cannot be read, version %s stays: %s", self.version, error)
            self._waiting = True
        except Exception as error:  # noqa: BLE001 (whatever is wrong with it, the catalog in use must stay)
            self._refuse(published, error)

    def _watch(self) -> None:
        while not self._stop.wait(self._refresh_s):
            self.look()

    def _is_due(self) -> bool:
        return time.monotonic() - self._refused_at >= _RETRY_REFUSED_S

    def _refuse(self, version: str, error: Exception) -> None:
        reason = str(error) if isinstance(error, LorauterError) else repr(error)
        if self.refused != (version, reason):
            logger.error("catalog version %s is refused, the one in use stays: %s", version, reason)
        self.refused = version, reason
        self._refused_at = time.monotonic()

    def _load(self, version: str) -> Retriever:
        before = self.retriever.catalog if hasattr(self, "retriever") else None
        catalog = Catalog.load(_Kept(self._keep, self._store), version=version, known=before)
        catalog.read_whole(known=before)
        retriever = self._retriever(catalog)
        with suppress(StoreError, OSError):  # a full disk is no reason to refuse a catalog
            kept = DirectoryStore(self._keep)
            kept.write(CURRENT_FILE, version.encode())
            for other in kept.children():
                if other not in (version, FOLDER):
                    shutil.rmtree(self._keep / other, ignore_errors=True)
            for key in kept.files(FOLDER).keys() - set(map(key_of, catalog.parts)):
                kept.delete(key)
        return retriever

    def _retriever(self, catalog: Catalog) -> Retriever:
        try:
            probe, encoder = self._probe()
        except Exception as error:
            raise ServiceUnavailable(f"the encoder does not answer: {error!r}") from error
        catalog.check_probe(probe, encoder)
        self._check(catalog)
        retriever = Retriever(catalog, self._config)
        retriever.retrieve(probe[None], [PROBE_TEXT], [RoutingOptions()])  # its parts fit each other
        return retriever


class _Kept(DirectoryStore):
    """A store, of which whatever is read is kept in a folder; parts are read from there, if they are what they were."""

    def __init__(self, root: Path, source: ObjectStore) -> None:
        super().__init__(root)
        self._source = source

    @property
    def uri(self) -> str:
        return self._source.uri

    def read(self, key: str) -> bytes:
        with suppress(StoreError):
            content = super().read(key) if key.startswith(f"{FOLDER}/") else b""
            if key == key_of(digest_of(content)):
                return content
        content = self._source.read(key)
        with suppress(StoreError, OSError):
            self.write(key, content)
        return content
