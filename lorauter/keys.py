"""API keys as they are kept: hashes, with names, roles, limits and adapters. A file of them is a YAML or JSON list.

Knows nothing of requests.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from lorauter.errors import ConfigError
from lorauter.names import RULE, is_valid_name
from lorauter.yaml_text import read_yaml

Role = Literal["inference", "admin"]
PerMinute = Annotated[int, Field(ge=1)] | None
_PREFIX = "lr-"


class ApiKey(BaseModel):
    """A key as it is kept.

    Attributes:
        name: whose it is; the only thing of it that logs show.
        sha256: of the key, in hexadecimal digits.
        roles: what it may do: "inference" asks, "admin" changes adapters and tasks.
        adapters: patterns of the adapters that it may use and see (`*`, `?`, `[...]`); None is all of them.
        requests_per_minute: None is without limit.
        tokens_per_minute: prompt and answer together; None is without limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    roles: Annotated[frozenset[Role], Field(min_length=1)] = frozenset({"inference"})
    adapters: tuple[str, ...] | None = None
    requests_per_minute: PerMinute = None
    tokens_per_minute: PerMinute = None

    @field_validator("name")
    @classmethod
    def _valid_name(cls, value: str) -> str:
        if not is_valid_name(value):
            raise ValueError(f"a name is {RULE}")
        return value


_ROWS = TypeAdapter(list[ApiKey])


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is kept of a key. The keys are long and random, so that a plain hash cannot be searched."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str, source: str) -> list[ApiKey]:
    """Read a list of keys. Raises ConfigError, which repeats nothing that may be a key."""
    try:
        rows = _ROWS.validate_python(read_yaml(text) or [])
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise ConfigError(f"{source} is no YAML or JSON, line {line}", setting="access") from None
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)[:5]
        what = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}" for item in problems)
        raise ConfigError(f"{source}, keys by their place from 0: {what}", setting="access") from None
    for field in ("name", "sha256"):
        values = [getattr(row, field) for row in rows]
        if len(set(values)) < len(values):
            twice = next(row.name for row in rows if values.count(getattr(row, field)) > 1)
            raise ConfigError(f"{source}: two keys have the same {field}, one of them is {twice}", setting="access")
    return rows
