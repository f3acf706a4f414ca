"""Whether a catalog, the base model and the adapters' store belong together. Knows names, and loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Collection

from deployments.config import AppConfig
from lorauter.adapters import AdapterRepository, open_store
from lorauter.adapters.weights import model_name
from lorauter.catalog import Catalog
from lorauter.defaults import base_model_aliases, resolve_adapters
from lorauter.errors import CatalogError, ConfigError, StoreUnavailable

_NAMED = 5


def check_base_model(catalog: Catalog, config: AppConfig) -> None:
    """Raise CatalogError if all adapters of a catalog were trained for other base models than the configuration's."""
    names = (config.base_model, *config.base_model_aliases, *base_model_aliases(config.base_model))
    bases = [base for base in catalog.base_model.split(", ") if base]
    if bases and {model_name(base) for base in bases}.isdisjoint(map(model_name, names)):
        raise CatalogError(
            f"its adapters were trained for the base model {', '.join(bases)}, and base_model is {config.base_model}; "
            "serve that model, or, if it is the same one, add the name to base_model_aliases",
            uri=str(config.catalog),
        )


def check_adapters(catalog: Catalog | None, config: AppConfig, warn: Callable[[str], None]) -> None:
    """Check that the store has the adapters that a catalog serves, or any; `warn` is told of some that are missing.

    Raises:
        ConfigError: it has none.
        StoreError: it refuses, or there is none.
    """
    uri = resolve_adapters(config.adapters)
    try:
        stored = set(AdapterRepository(open_store(uri)).names())
    except StoreUnavailable as error:  # caches may have what is asked for
        warn(f"the adapters' store does not answer: {error}")
        return
    if catalog is None:
        if not stored:
            raise ConfigError(
                f"there is no adapter in {uri}, and no catalog; correct the URI, or run 'lorauter adapters push DIR "
                f"--to {uri}'",
                setting="adapters",
            )
        return
    wanted = {adapter.name for entry in catalog.entries for adapter in entry.adapters}
    if wanted and wanted.isdisjoint(stored):
        raise ConfigError(
            f"none of the {len(wanted)} adapters that the catalog serves ({_some(wanted)}) is in {uri}, which holds "
            f"{_some(stored) or 'no adapter'}; correct the URI, or push them: 'lorauter adapters push DIR --to {uri}'",
            setting="adapters",
        )
    if missing := wanted - stored:
        warn(f"not in {uri}, though the catalog serves them: {_some(missing)}")


def check_examples(catalog: Catalog, warn: Callable[[str], None]) -> None:
    """Warn where `routing.examples` would come to nothing: nobody has found out which tasks they help."""
    if not any(entry.shown for entry in catalog.entries):
        warn(
            "routing.examples shows nothing: nobody has found out which of the catalog's tasks examples help; build it "
            "with 'lorauter catalog build --examples N'"
        )


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_NAMED]) + (f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else "")
