"""What can be known to be wrong before anything starts: keys, folders, models, stores, and what does not go together.

Takes seconds, and loads no weights. What only a replica can find out, room on its GPU for one, that tells itself; see
`deployments.startup`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from deployments.access import Access
from deployments.adapter_cache import cache_folder
from deployments.config import AppConfig
from deployments.fits import check_adapters, check_base_model, check_examples
from deployments.live_catalog import kept_folder
from lorauter.catalog import Catalog
from lorauter.defaults import describe_model, load_encoder, resolve_catalog, resolve_encoder, resolve_model
from lorauter.engine.cpu_kernels import load_kernels
from lorauter.engine.model import ARCHITECTURES
from lorauter.engine.model_config import read_config
from lorauter.errors import CatalogError, ConfigError, StoreError
from lorauter.precision import native_dtype

Tell = Callable[[str], None]


def preflight(config: AppConfig, warn: Tell, notify: Tell = lambda _: None) -> Catalog | None:
    """Check a service's configuration against this machine; returns the catalog that it starts with, if it has one.

    Args:
        config: its paths are absolute.
        warn: is told what the service can live with.
        notify: is told what is made ready on the way.

    Raises:
        ConfigError, CatalogError, StoreError: what is wrong, and what to do.
    """
    read: list[Catalog] = []
    for _, check in checks(config, read, warn, notify):
        check()
    return read[0] if read else None


def checks(
    config: AppConfig, read: list[Catalog], warn: Tell, notify: Tell
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What `preflight` checks, in its order: a name, and a function that raises what is wrong.

    Args:
        config, warn, notify: as `preflight` takes them.
        read: is given the catalog; where it is not, since its check has failed, nothing is compared to it.
    """
    if config.access.closed:
        yield "keys", lambda: Access(config.access)
    yield "adapter cache", lambda: _check_writable(cache_folder(config.cache))
    yield "base model", lambda: _check_base_model(describe_model(config.base_model, notify))
    yield "encoder", lambda: resolve_encoder(config.encoder, notify)
    if config.catalog is None:
        yield "adapters", lambda: check_adapters(None, config, warn)
        return
    uri = config.catalog

    yield "catalog", lambda: read.append(_read_catalog(resolve_catalog(uri, notify), warn))
    if read:
        [catalog] = read
        yield "encoder of the catalog", lambda: _check_encoder(catalog, config)
        if catalog.states is not None and (states := config.state_model) is not None:
            yield "model of states", lambda: resolve_model(states, notify)
        yield "base model of the catalog", lambda: check_base_model(catalog, config)
        yield "adapters of the catalog", lambda: check_adapters(catalog, config, warn)
        if config.routing.examples:  # which nobody needs to set
            yield "examples of the catalog", lambda: check_examples(catalog, warn)


def check_device(device: str, dtype: str) -> None:
    """Make this machine ready to compute on a device: the CPU's kernels are built, once, or a warning says why not.

    Raises:
        ConfigError: there is no such device.
    """
    place = check_gpu(device)
    if place.type == "cpu":
        load_kernels(native_dtype(place) if dtype == "auto" else getattr(torch, dtype))


def check_gpu(device: str) -> torch.device:
    """The device that a setting names. Raises ConfigError: it is a GPU, and there is none."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"engine.device is {device!r}, but PyTorch {torch.__version__} finds no GPU; take 'auto' or 'cpu', or "
            "install PyTorch with CUDA and the GPU's driver",
            setting="engine.device",
        )
    return place


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the adapters' cache {folder} cannot be written: {error}; name another folder in cache.directory",
            setting="cache.directory",
        ) from error


def _check_base_model(model: str) -> None:
    if read_config(model) is not None:  # of one of the served kinds
        return
    from transformers import AutoConfig  # seconds to import
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        kind = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"base model {model!r} cannot be loaded: {error}", setting="base_model") from error
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, kind)
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"base model {model!r} is a {architecture}; served are {', '.join(ARCHITECTURES)}", setting="base_model"
        )


def _check_encoder(catalog: Catalog, config: AppConfig) -> None:
    if catalog.encoder != Path(resolve_encoder(config.encoder)).name:  # else it takes seconds, and replicas do it too
        catalog.check_encoder(load_encoder(config.encoder, device="cpu"))


def _read_catalog(uri: str, warn: Tell) -> Catalog:
    """The published catalog, or else the one that `LiveCatalog` would start with."""
    try:
        return Catalog.load(uri)
    except (CatalogError, StoreError) as error:
        try:
            kept = Catalog.load(kept_folder(uri))
        except (CatalogError, StoreError):
            raise error from None
        warn(f"{error}; version {kept.version}, which was in use here last, serves until that is mended")
        return kept
