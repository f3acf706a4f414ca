"""The typed configuration of a batch job: every setting, its default and its bounds. No logic but checks."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from deployments.config import AppConfig, CacheSettings, HostSettings, Positive, Settings, explain
from deployments.openai_types import SamplingOptions
from lorauter.engine.config import EngineConfig
from lorauter.errors import ConfigError
from lorauter.routing.options import RoutingConfig
from lorauter.yaml_text import read_yaml

Format = Literal["jsonl", "csv", "parquet"]
OutputFormat = Literal["jsonl", "csv", "parquet", "openai"]


class Columns(Settings):
    """The columns that a row is read from; null leaves one unread. A row need not have any but one of the first two.

    Attributes:
        prompt: a text.
        messages: a chat, `[{"role", "content"}, ...]`; it goes before the prompt.
        adapters: adapters chosen by hand: a name, or `{name: weight}`, or `[{"name", "weight"}, ...]`; `{}` is the base
            model alone, and null routes the row.
        options: routing options, `{"top_k", "temperature", "exclude_tasks", "exclude_adapters", "allow_adapters"}`.
        max_tokens, temperature, ...: the row's sampling, in place of the job's.
    """

    prompt: str = "prompt"
    messages: str | None = "messages"
    adapters: str | None = "adapters"
    options: str | None = "lorauter"
    max_tokens: str | None = "max_tokens"
    temperature: str | None = "temperature"
    top_p: str | None = "top_p"
    top_k: str | None = "top_k"
    min_p: str | None = "min_p"
    presence_penalty: str | None = "presence_penalty"
    frequency_penalty: str | None = "frequency_penalty"
    repetition_penalty: str | None = "repetition_penalty"
    logit_bias: str | None = "logit_bias"
    stop: str | None = "stop"
    ignore_eos: str | None = "ignore_eos"
    min_tokens: str | None = "min_tokens"
    stop_token_ids: str | None = "stop_token_ids"  # noqa: S105 (a column's name)
    include_stop_str_in_output: str | None = "include_stop_str_in_output"
    skip_special_tokens: str | None = "skip_special_tokens"
    allowed_token_ids: str | None = "allowed_token_ids"  # noqa: S105
    bad_words: str | None = "bad_words"
    response_format: str | None = "response_format"
    structured_outputs: str | None = "structured_outputs"
    guided_json: str | None = "guided_json"
    guided_regex: str | None = "guided_regex"
    guided_choice: str | None = "guided_choice"
    guided_grammar: str | None = "guided_grammar"
    guided_whitespace_pattern: str | None = "guided_whitespace_pattern"
    seed: str | None = "seed"


class Sampling(SamplingOptions):
    """How answers are sampled where a row does not say: the API's options, whose numbers may come as text.

    Of the seed, and of its own place in the input, each row's numbers are made.
    """

    model_config = ConfigDict(strict=False)


class Pool(Settings):
    """A pool of workers.

    Attributes:
        workers: how many.
        cpus, gpus: that each takes of the cluster; how many threads an engine has is `engine.threads`. Where `gpus` is
            null, a worker with an engine takes one, if there are enough.
    """

    workers: Positive = 1
    cpus: Annotated[float, Field(ge=0)] = 0.5
    gpus: Annotated[float, Field(ge=0)] | None = None


_SHARED = ("base_model", "encoder", "state_model", "adapters", "catalog", "cache")  # with the service, and paths


class BatchConfig(Settings):
    """A batch job, but for where its input and output are.

    Attributes:
        base_model, base_model_aliases, encoder, state_model, adapters, catalog, engine, host, cache: as for the service
            (`deployments.config`); `engine.max_queue` is not used.
        routing: the router's settings; a row's `tasks` are the first `num_tasks`.
        columns: where a row's prompt and settings are.
        prompts: "chat" makes a prompt the user's message of a chat; "plain" continues it as it is.
        system: the system message of such chats.
        route_on: the text of a chat that is routed: its last user message, or the whole conversation.
        sampling: for rows without settings of their own.
        route_only: decide, and generate nothing.
        format: the output's; null takes the input's. "openai" is that of OpenAI's batch output: JSON lines with
            `custom_id` and `response`, and none of a row's own columns.
        column_clash: what becomes of input columns that have the names of columns which are added: "keep" writes them
            as `input_` and their name, "refuse" refuses the job.
        shard_rows: rows, at most, that are read, ordered, answered and written together, and done again if a worker is
            lost. More of them keep a large engine busier between two shards. The first shards are smaller.
        max_errors: the job stops once more rows than this have failed; null never stops it.
        route_workers, answer_workers: the pools of the two stages.
        worker_wait_s: seconds for which the job waits for the cluster to have room for a worker of each pool, before it
            gives up; null waits as long as it takes. What it waits for is told after ten seconds.
    """

    base_model: str = "default"
    base_model_aliases: tuple[str, ...] = ()
    encoder: str = "default"
    state_model: str | None = "default"
    adapters: str = "default"
    catalog: str = "default"
    routing: RoutingConfig = RoutingConfig(num_tasks=3)
    engine: EngineConfig = EngineConfig()
    host: HostSettings = HostSettings()
    cache: CacheSettings = CacheSettings()
    columns: Columns = Columns()
    prompts: Literal["chat", "plain"] = "chat"
    system: str | None = None
    route_on: Literal["last_user_message", "conversation"] = "last_user_message"
    sampling: Sampling = Sampling()
    route_only: bool = False
    format: OutputFormat | None = None
    column_clash: Literal["keep", "refuse"] = "keep"
    shard_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    max_errors: Annotated[int, Field(ge=0)] | None = None
    route_workers: Pool = Pool()
    answer_workers: Pool = Pool(cpus=1)
    worker_wait_s: Annotated[FiniteFloat, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _system_needs_chats(self) -> "BatchConfig":
        if self.system is not None and self.prompts == "plain":
            raise ValueError("system needs prompts: chat")
        return self

    @model_validator(mode="after")
    def _openais_format_is_of_answers(self) -> "BatchConfig":
        if self.format == "openai" and self.route_only:
            raise ValueError("format: openai needs answers, and route_only makes none")
        return self

    @classmethod
    def parse(cls, settings: object) -> "BatchConfig":
        """Validate raw settings. Raises ConfigError with what is wrong, by its name."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ConfigError(explain(error, "setting")) from error

    @classmethod
    def read(cls, path: Path, **changes: Any) -> "BatchConfig":
        """Read a YAML file; `changes` other than None go before it. Raises ConfigError."""
        try:
            data = read_yaml(path.read_bytes())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if not isinstance(data, dict | None):
            raise ConfigError(f"{path} must be a mapping of settings, got {type(data).__name__}")
        return cls.parse(data or {}).changed(**changes)

    def changed(self, **changes: Any) -> "BatchConfig":
        """The same with other values; None leaves one as it is. Raises ConfigError."""
        given = {name: value for name, value in changes.items() if value is not None}
        return self.parse({**self.model_dump(exclude_unset=True), **given}) if given else self

    def with_absolute_paths(self, root: Path) -> "BatchConfig":
        """The same with relative folders resolved against `root`; see `AppConfig.with_absolute_paths`."""
        shared = {name: getattr(self, name) for name in _SHARED}
        resolved = AppConfig(**shared).with_absolute_paths(root)
        return self.model_copy(update={name: getattr(resolved, name) for name in shared})

    def decides(self) -> dict[str, Any]:
        """The settings that the output depends on: a job is resumed with the same ones only."""
        settings = self.model_dump(mode="json")
        for name in (
            "host",
            "cache",
            "max_errors",
            "route_workers",
            "answer_workers",
            "worker_wait_s",
            "format",
            "column_clash",
            "catalog",
        ):
            del settings[name]
        settings["engine"] = {name: settings["engine"][name] for name in ("max_model_len", "max_rank", "dtype")}
        if self.route_only:
            for name in ("base_model", "base_model_aliases", "adapters", "engine", "sampling", "prompts", "system"):
                del settings[name]
        return settings


def row_seed(seed: int, number: int) -> int:
    """The seed of a row by its number in the whole input."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, number]).encode()).digest()[:8], "big")
