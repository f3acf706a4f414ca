"""The typed configuration of the Serve app: every setting, its default and its bounds.

How many replicas a deployment has, how it scales, and which CPUs and GPUs a replica gets is Ray Serve's own
configuration (`deployments:` in serve_config.yaml), not this one's.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from lorauter.defaults import DEFAULT
from lorauter.engine import EngineConfig
from lorauter.errors import ConfigError
from lorauter.routing.options import RoutingConfig

Positive = Annotated[int, Field(ge=1)]
_NAMED, _LISTED = 5, 1000  # wrong fields that a message names; that are listed at all


class Settings(BaseModel):
    """Settings that do not change, and know their names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheSettings(Settings):
    """The adapter cache on each node's disk.

    Attributes:
        directory: its folder; "default" is `adapters` in LORAUTER_HOME.
        disk_bytes: bytes of adapters to keep at most.
        downloads: adapters downloaded at the same time.
    """

    directory: str = "default"
    disk_bytes: Positive = 20 << 30
    downloads: Annotated[int, Field(ge=1, le=64)] = 8


class HostSettings(Settings):
    """The adapters in the host memory of each `LoraModel` replica.

    Attributes:
        adapter_bytes: bytes of them at most, beside what running requests hold.
        wait_s: seconds for which a request waits for its adapters to come here; then it is answered with 503.
    """

    adapter_bytes: Positive = 4 << 30
    wait_s: Annotated[float, Field(gt=0, le=86400)] = 30.0


class ComposeSettings(Settings):
    """What Ray gives the process that composes adapters for tasks, while there are some to be composed.

    Attributes:
        num_cpus: 0 takes of the cores what nobody else wants, on any node.
        num_gpus: with 0 it computes on the CPU: minutes for a task, where a GPU takes seconds.
        memory: bytes that Ray keeps for it; null is none.
        resources: Ray's own resources, which say on which nodes it may run.
    """

    num_cpus: Annotated[float, Field(ge=0)] = 0.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    memory: Positive | None = None
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class ApiSettings(Settings):
    """The HTTP API.

    Attributes:
        route_on: the text of a chat that is routed: its last user message, or the whole conversation.
        default_max_tokens: answers' bound where a request gives none.
        default_temperature: where a request gives none; 0 answers with the likeliest tokens.
        max_body_bytes: larger requests are answered with 413.
        max_adapter_bytes: the same for adapters that are uploaded.
        max_prompt_chars: characters of a prompt, or of a text to route, at most; the model's context bounds its tokens.
        max_adapters: adapters a request may mix by hand at most.
        max_inputs: texts that one request may have routed at most.
        ping_s: seconds of silence in a streamed answer after which a comment is sent (`: ping`), so that nobody on the
            way takes the connection for dead; null sends none.
        metrics_of: whose metrics `GET /metrics` has: those of the ingress's node, or of all nodes of the cluster.
        vllm_metrics: whether `GET /metrics` has vLLM's names too, which gateways and dashboards read.
        listen: `HOST:PORT` where the ingress's replicas answer by themselves, all of a machine at the same one; null
            leaves that to Serve's proxies. `lorauter serve` sets it where it starts a Ray of its own and the file asks
            for nothing that takes a proxy.
        first_token_s: seconds until an answer begins, or a part of the service answers, at most, the wait for a
            replica in a dead one's place included; then the request is answered with 503.
    """

    route_on: Literal["last_user_message", "conversation"] = "last_user_message"
    default_max_tokens: Positive = 256
    default_temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_body_bytes: Positive = 1 << 20
    max_adapter_bytes: Positive = 512 << 20
    max_prompt_chars: Positive = 200_000
    max_adapters: Annotated[int, Field(ge=1, le=1024)] = 64
    max_inputs: Positive = 256
    ping_s: Annotated[float, Field(gt=0, le=86400)] | None = 15.0
    metrics_of: Literal["node", "cluster"] = "node"
    vllm_metrics: bool = True
    listen: Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):\d{1,5}$")] | None = None
    first_token_s: Annotated[float, Field(gt=0, le=86400)] = 60.0


class AccessSettings(Settings):
    """Who may use the service; docs/access.md has the keys' format. With neither setting everybody may.

    Attributes:
        keys_file: a YAML or JSON list of keys' hashes, on every node that runs a Router; read again when it changes.
        keys_env: the environment variable that holds the same; read once.
        trusted_hosts: where no keys are configured, names of this machine, beside "localhost", that requests over the
            loopback may be sent to (a proxy's, say), and hosts whose web pages may use the service.
        cors_origins: origins (`https://app.example`) whose pages browsers let use the service, and read its answers;
            "*", which needs keys, is all. Without any, no CORS header is sent.
    """

    keys_file: str | None = None
    keys_env: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _all_pages_need_keys(self) -> "AccessSettings":
        if "*" in self.cors_origins and not self.closed:
            raise ValueError("cors_origins '*' needs keys: any page would use the service; list origins instead")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> "AccessSettings":
        if self.keys_file is not None and self.keys_env is not None:
            raise ValueError("give keys_file or keys_env, not both")
        return self

    @property
    def closed(self) -> bool:
        """Whether a key is needed."""
        return self.keys_file is not None or self.keys_env is not None


class AppConfig(Settings):
    """The `args` of the Serve app.

    Attributes:
        base_model: "default" (SmolLM2-135M-Instruct), a Hugging Face id, a folder, or a store's URI (`hf://`, `s3://`,
            `gs://`, `az://`).
        base_model_aliases: further names that adapters may give as their base model.
        encoder: "default" (all-MiniLM-L6-v2), or as a base model is named.
        state_model: the model whose hidden states the catalog has, if it has any: "default" (SmolLM2-135M-Instruct), or
            as a base model is named. It reads the queries that `routing.sure` tells it to; null has none read.
        adapters: the adapter store: "default" (the example pool), a folder, or a store's URI.
        catalog: "default" (the example tasks), a folder, or a store's URI; it alone says which adapters are
            served. Null, or left out where `adapters` is given: all of the store's adapters are served by name, each
            in its newest version, and nothing is routed.
        catalog_refresh_s: seconds between two looks at which version of the catalog is published, or, without one, at
            what the store holds.
        mps: whether `lorauter serve`, where it starts Ray itself, lets the processes on a GPU compute at the same time,
            by NVIDIA's MPS, if that is there; else they take turns.
    """

    base_model: str = "default"
    base_model_aliases: tuple[str, ...] = ()
    encoder: str = "default"
    state_model: str | None = "default"
    adapters: str = "default"
    catalog: str | None = "default"
    catalog_refresh_s: Annotated[float, Field(ge=0.1, le=3600)] = 2.0
    mps: bool = True
    routing: RoutingConfig = RoutingConfig()
    engine: EngineConfig = EngineConfig()
    host: HostSettings = HostSettings()
    cache: CacheSettings = CacheSettings()
    compose: ComposeSettings = ComposeSettings()
    api: ApiSettings = ApiSettings()
    access: AccessSettings = AccessSettings()

    @model_validator(mode="before")
    @classmethod
    def _no_catalog_of_other_adapters(cls, given: Any) -> Any:
        own = isinstance(given, dict) and given.get("adapters", DEFAULT) != DEFAULT
        return {"catalog": None, **given} if own else given

    @classmethod
    def parse(cls, args: dict[str, Any]) -> "AppConfig":
        """Validate raw settings. Raises ConfigError with a line for each setting that is wrong, by its name."""
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError(explain(error, "setting")) from error

    def with_absolute_paths(self, root: Path) -> "AppConfig":
        """The same configuration with relative folders resolved against `root`, so that any process finds them.

        A name that is no folder below `root` (a URI, "default", a Hugging Face id) stays as it is.
        """
        resolved = {
            key: _absolute(root, value)
            for key in ("base_model", "encoder", "state_model", "adapters", "catalog")
            if (value := getattr(self, key)) not in (None, DEFAULT)
            and "://" not in value
            and (value.startswith((".", "~")) or (root / value).is_dir())
        }
        cache = self.cache
        if cache.directory != DEFAULT:
            cache = cache.model_copy(update={"directory": _absolute(root, cache.directory)})
        access = self.access
        if access.keys_file is not None:
            access = access.model_copy(update={"keys_file": _absolute(root, access.keys_file)})
        return self.model_copy(update={**resolved, "cache": cache, "access": access})


def _absolute(root: Path, path: str) -> str:
    try:
        return str((root / Path(path).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # nobody's home; a loop of links; a name that no file has
        raise ConfigError(f"{path!r} can be no file or folder: {error}") from error


def explain(error: ValidationError, noun: str) -> str:
    """A validation error in one line, naming each field; of what was given, short plain values alone are repeated."""
    items = _items(error)
    problems = []
    for item in items[:_NAMED]:
        name = _name(item) or "the whole"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"unknown {noun} {name}")
        else:
            given = _given(item["input"]) if item["loc"] else ""  # else all that was given, prompt and all
            problems.append(f"{noun} {name}: {item['msg']}{given}")
    if more := error.error_count() - len(problems):
        problems.append(f"{more} more {noun}s are wrong" if problems else f"{more} {noun}s are wrong")
    return "; ".join(problems)


def first_field(error: ValidationError) -> str | None:
    """The name of the first field that is wrong, unless it is the whole."""
    items = _items(error)
    return (_name(items[0]) or None) if items else None


def _items(error: ValidationError) -> list[ErrorDetails]:
    # A large body can be wrong in hundreds of thousands of places, and to list them would take seconds.
    return error.errors(include_url=False) if error.error_count() <= _LISTED else []


def _name(item: ErrorDetails) -> str:
    name = ".".join(str(part) for part in item["loc"])
    return name if len(name) <= 100 else name[:97] + "..."


def _given(value: object) -> str:
    given = "" if isinstance(value, dict | list | tuple) else json.dumps(value, default=repr)
    return f" (got {given})" if 0 < len(given) < 80 else ""
