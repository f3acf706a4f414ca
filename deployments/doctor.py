"""What is wrong with a set-up, all of it at once: the machine, then what serve_config.yaml names on it.

Looks where `deployments.preflight` and `deployments.launch` look before a start, but goes on after the first thing that
is wrong, and tries what these do not: the packages' versions, the memory, and the stores by a real round trip. Imports
are the functions' own, since one that fails is a finding too. Knows nothing of how findings are shown.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from lorauter.errors import ConfigError, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from deployments.config import AppConfig
    from deployments.launch import ServeFile
    from lorauter.adapters import ObjectStore
    from lorauter.catalog import Catalog
    from lorauter.engine import EngineConfig

Tell = Callable[[str], None]
_PROCESSES_BYTES = 4 << 30  # what Ray's processes and the replicas take, beside the model
_SHARED, _SHARED_BYTES = Path("/dev/shm"), 512 << 20  # noqa: S108 (it is Ray's); containers have 64 MiB by default


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        status: a warning is what the service can live with.
        message: what there is; where that is not as it should be, what is needed and what to do, too.
    """

    check: str
    status: Literal["ok", "warning", "wrong"]
    message: str


def examine(
    path: Path, *, host: str | None = None, port: int | None = None, notify: Tell = lambda _: None
) -> Iterator[Finding]:
    """Check this machine, and that a service can start on it; each finding comes as soon as it is there.

    Args:
        path: the service's configuration.
        host, port: in place of the configuration's.
        notify: is told what is made ready on the way: the default model, the catalog of the examples.
    """
    files: list[ServeFile] = []
    warned: list[str] = []
    try:
        about = importlib.metadata.metadata("lorauter")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "warning", "lorauter is on the path, but not installed: what it needs is not known")
    else:
        yield from _check("Python", lambda: _python(about["Requires-Python"]), warned)
        yield from _check("packages", lambda: _packages(about.get_all("Requires-Dist", [])), warned)
    yield from _check("configuration", lambda: _configuration(path, files), warned)
    engine = files[0].config.engine if files else None
    yield from _check("GPU", lambda: _gpu(engine, warned.append), warned)
    yield from _check("compiler", lambda: _compiler(engine, warned.append), warned)
    if files:
        file = replace(files[0], host=host or files[0].host, port=port or files[0].port)
        yield from _check("port", lambda: _port(file), warned)
        yield from _service(file.config.with_absolute_paths(Path.cwd()), notify)


def _service(config: AppConfig, notify: Tell) -> Iterator[Finding]:
    """What a cause makes impossible to check is left out: it would only be told again."""
    from deployments.preflight import checks

    warned: list[str] = []
    wrong: set[str] = set()

    def checked(name: str, look: Callable[[], str]) -> Iterator[Finding]:
        for finding in _check(name, look, warned):
            wrong.update([name] if finding.status == "wrong" else [])
            yield finding

    yield from checked("adapters' store", lambda: _adapters(config))
    if config.catalog is not None:
        yield from checked("catalog's store", lambda: _catalog(config))
    unreached = bool(wrong)
    read: list[Catalog] = []
    for name, check in checks(config, read, warned.append, notify):
        if unreached and name in ("catalog", "adapters"):
            break
        if name.removesuffix(" of the catalog") not in wrong:
            yield from checked(name, lambda check=check: _preflight(check, read))  # type: ignore[misc]
    if "base model" not in wrong:
        yield from checked("memory", lambda: _memory(config, warned.append))


def _check(name: str, look: Callable[[], str], warned: list[str]) -> Iterator[Finding]:
    """The findings of one check, which says what there is, raises what is wrong, and warns of the rest."""
    try:
        said = look()
    except Exception as error:  # noqa: BLE001 (whatever it is is what is looked for)
        yield Finding(name, "wrong", _explained(error))
    else:
        if not warned:
            yield Finding(name, "ok", said)
    yield from (Finding(name, "warning", text) for text in warned)
    warned.clear()


def _explained(error: Exception) -> str:
    try:
        from deployments.startup import explained
    except ImportError:  # Ray's
        return f"{type(error).__name__}: {error}"
    return explained(error)


def _python(needed: str) -> str:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if version not in SpecifierSet(needed):
        raise ConfigError(f"this is Python {version}, and lorauter needs {needed}; make the environment with another")
    return f"{version}, of {platform.machine()}"


def _packages(lines: Iterable[str]) -> str:
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in lines]
    needed = [row for row in needed if row.marker is None or row.marker.evaluate({"extra": ""})]
    problems = []
    for row in needed:
        try:
            version = importlib.metadata.version(row.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{row.name} is not installed, needed is {row.specifier}")
            continue
        if not row.specifier.contains(version, prereleases=True):
            problems.append(f"{row.name} is {version}, needed is {row.specifier}")
    if problems:
        raise ConfigError(f"{'; '.join(problems)}; run 'make install' in a checkout, else 'pip install lorauter' anew")
    return f"all {len(needed)} have versions that fit"


def _configuration(path: Path, files: list[ServeFile]) -> str:
    from deployments.launch import ServeFile

    files.append(ServeFile.read(path))
    return str(path)


def _gpu(engine: EngineConfig | None, warn: Tell) -> str:
    import shutil

    import torch

    from deployments.preflight import check_gpu

    if engine is not None:
        check_gpu(engine.device)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return f"{torch.cuda.device_count()} of {name}, the first with {_gib(free)} of {_gib(total)} free"
    if shutil.which("nvidia-smi"):
        warn(
            f"there is an NVIDIA driver, but PyTorch {torch.__version__} finds no GPU, so that the CPU serves; install "
            "PyTorch with CUDA, and see that nvidia-smi lists the GPU"
        )
    return "none: the CPU serves"


def _compiler(engine: EngineConfig | None, warn: Tell) -> str:
    import torch

    from lorauter.engine.cpu_kernels import find_compiler, load_kernels
    from lorauter.precision import native_dtype

    try:
        compiler = find_compiler()
    except FileNotFoundError as error:
        warn(f"{error}, so that PyTorch's slower operations serve on a CPU; install g++, or name a compiler in CXX")
        return ""
    if torch.cuda.is_available() and (engine is None or engine.device != "cpu"):
        return compiler
    if load_kernels(native_dtype(torch.device("cpu"))) is None:  # which logs why
        warn(f"{compiler} does not build the CPU's kernels, so that PyTorch's slower operations serve; install g++")
    return f"{compiler}, which builds the CPU's kernels"


def _port(file: ServeFile) -> str:
    from deployments.launch import check_port

    check_port(file.host, file.port)
    return f"{file.host}:{file.port} is free"


def _adapters(config: AppConfig) -> str:
    from lorauter.adapters import AdapterRepository, open_store
    from lorauter.defaults import DEFAULT, resolve_adapters

    uri = resolve_adapters(config.adapters)
    _check_folder(uri, "adapters")
    store = open_store(uri)
    names = AdapterRepository(store).names()
    if names:
        AdapterRepository(store).manifest(names[0])  # listing and reading are two rights
    return f"{len(names)} adapters in {uri}" + ("" if config.adapters == DEFAULT else f"; {_round_trip(store)}")


def _catalog(config: AppConfig) -> str:
    from lorauter.adapters import open_store
    from lorauter.catalog import current_version
    from lorauter.defaults import DEFAULT

    assert config.catalog is not None
    if config.catalog == DEFAULT:
        return "of the examples: this machine's own"
    _check_folder(config.catalog, "catalog")
    version, store = current_version(config.catalog), open_store(config.catalog)
    return f"version {version or 'none'} is published in {config.catalog}; {_round_trip(store)}"


def _check_folder(uri: str, setting: str) -> None:
    if "://" not in uri and not Path(uri).expanduser().is_dir():
        raise ConfigError(f"there is no folder {uri}; correct {setting}, or make it", setting=setting)


def _round_trip(store: ObjectStore) -> str:
    """Write, read and delete an object of a name that nobody has. Raises StoreError."""
    key = f".lorauter-doctor-{uuid4().hex}"
    try:
        store.write(key, key.encode())
    except StoreError as error:
        if isinstance(error, StoreUnavailable) and not isinstance(error.__cause__, PermissionError):
            raise
        return "it may be read, which serving needs, but not written, which pushes and changes of the catalog need"
    try:
        same = store.read(key) == key.encode()
    finally:
        try:
            store.delete(key)
        except StoreError as error:
            raise StoreError(
                f"{key} was written and cannot be deleted ({error}); allow to delete, and delete it", uri=store.uri
            ) from error
    if not same:
        raise StoreError(f"{key} was written and reads otherwise; is there a cache before the store?", uri=store.uri)
    return "written, read and deleted"


def _preflight(check: Callable[[], object], read: list[Catalog]) -> str:
    known = bool(read)
    check()
    if read and not known:
        return f"version {read[0].version}: {len(read[0].tasks)} tasks, {len(read[0].adapters)} adapters"
    return "fits" if known else "is there"


def _memory(config: AppConfig, warn: Tell) -> str:
    import shutil

    import torch
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    from lorauter.defaults import resolve_model

    free = get_system_memory() - get_used_memory()  # type: ignore[no-untyped-call]  # in a container's own limits
    folder = Path(resolve_model(config.base_model)).expanduser()
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    needed, adapters = weights + _PROCESSES_BYTES, config.host.adapter_bytes
    amounts = f"{_gib(free)} are free, needed are about {_gib(needed)}"
    if free < needed:
        raise ConfigError(
            f"{amounts} ({_gib(weights)} for the base model, {_gib(_PROCESSES_BYTES)} for Ray and the replicas); end "
            "what else runs, or take a smaller base model or a larger machine"
        )
    if free < needed + adapters:
        warn(f"{amounts}, and {_gib(adapters)} for as many adapters as host.adapter_bytes allows; lower it")
    if torch.cuda.is_available() and config.engine.device != "cpu":
        room, _ = torch.cuda.mem_get_info()
        if room < weights:
            raise ConfigError(
                f"{_gib(room)} of the GPU are free, and the base model alone takes {_gib(weights)}; end what else uses "
                "the GPU, or take a smaller base model"
            )
    if _SHARED.is_dir() and (room := shutil.disk_usage(_SHARED).free) < _SHARED_BYTES:
        warn(
            f"{_gib(room)} of {_SHARED} are free; Ray wants {_gib(_SHARED_BYTES)} there for its objects, else "
            "they are on the disk; start a container with --shm-size=2g"
        )
    return amounts


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
