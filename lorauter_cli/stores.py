"""The catalogs and stores that commands name: "default" stands for the examples, which are read and never written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorauter.defaults import check_changeable, resolve_adapters, resolve_catalog
from lorauter.errors import ConfigError
from lorauter.uris import is_uri
from lorauter_cli.console import notify, phase

if TYPE_CHECKING:
    from lorauter.adapters import AdapterRepository
    from lorauter.catalog import Catalog
    from lorauter.states import StateModel

States = Annotated[
    str, typer.Option(help="Model of hidden states: a folder, an id, a store's URI, 'default', or 'none'.")
]
"""The option --states."""


def catalog_to_read(uri: str) -> str:
    """Where a catalog is. Raises ConfigError: there is no such folder."""
    uri = resolve_catalog(uri, notify)
    _check_folder(uri, "there is no catalog in {uri}, nor such a folder; run 'lorauter catalog build'", "catalog")
    return uri


def catalog_to_write(uri: str) -> str:
    """The same of one that is to be published. Raises ConfigError."""
    check_changeable(uri, "catalog")
    return uri


def state_model(states: str, catalog: Catalog | None = None) -> StateModel | None:
    """A model of hidden states, if one is named, and the catalog's tasks have states; checked against these.

    Raises:
        ConfigError: it cannot be loaded.
        CatalogError: the catalog's states are another model's.
    """
    from lorauter.catalog.build import probed
    from lorauter.defaults import load_states

    if states == "none" or (catalog is not None and catalog.states is None):
        return None
    with phase("loading the model of states"):
        model = load_states(states)
    if catalog is not None:
        catalog.check_states(probed(model))
    return model


def adapters_to_read(uri: str) -> AdapterRepository:
    """The adapters of a store. Raises ConfigError: there is no such folder."""
    from lorauter.adapters import AdapterRepository, open_store

    uri = resolve_adapters(uri)
    _check_folder(uri, "there is no adapter in {uri}, nor such a folder; run 'lorauter adapters push'", "adapters")
    return AdapterRepository(open_store(uri))


def adapters_to_use(uri: str) -> AdapterRepository:
    """The same, if there are some. Raises ConfigError."""
    repository = adapters_to_read(uri)
    if not repository.names():
        raise ConfigError(f"there is no adapter in {uri}; run 'lorauter adapters push'", setting="adapters")
    return repository


def adapters_to_write(uri: str) -> AdapterRepository:
    """The adapters of a store that is to be changed. Raises ConfigError."""
    from lorauter.adapters import AdapterRepository, open_store

    check_changeable(uri, "adapters")
    return AdapterRepository(open_store(uri))


def adapters_from(source: str) -> list[AbstractContextManager[Path]]:
    """The adapters of a folder, or of another store: a folder of each, which may be there no longer than it is used."""
    from lorauter.adapters import AdapterRepository, adapter_folders, open_store

    if not is_uri(source):
        return [nullcontext(folder.absolute()) for folder in adapter_folders(Path(source))]
    repository = AdapterRepository(open_store(source))
    return [_fetched(repository, name) for name in repository.newest()]


@contextmanager
def _fetched(repository: AdapterRepository, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        repository.download(repository.manifest(name), folder)
        yield folder


def _check_folder(uri: str, message: str, setting: str) -> None:
    if not is_uri(uri) and not Path(uri).expanduser().is_dir():
        raise ConfigError(message.format(uri=uri), setting=setting)
