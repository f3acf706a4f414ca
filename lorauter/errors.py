"""The one exception hierarchy.

Every error says what it got, what it needed and what to do, and carries the facts as fields. The classes
know nothing of HTTP: `deployments.api` maps them to status codes. They survive pickling with their fields,
because they cross process boundaries.

    LorauterError
    ├── InvalidRequest          the caller's input is wrong
    │   └── ContextLengthExceeded
    ├── ConfigError             a setting is wrong
    ├── TaskError               a task or a task file is wrong
    │   └── TaskNotFound
    ├── CatalogError            a catalog is missing, damaged or does not fit
    │   └── CatalogVersionNotFound
    ├── StoreError
    │   ├── ObjectNotFound
    │   │   └── BucketNotFound
    │   ├── ReadOnlyStore
    │   └── StoreUnavailable
    ├── AdapterError
    │   ├── AdapterNotFound
    │   ├── AdapterRejected     the adapter can never be served as it is
    │   └── AdapterUnavailable  the adapter cannot be had just now
    ├── CompositionNotFound
    ├── Conflict                somebody else changed the same thing meanwhile
    ├── Unauthenticated         no valid key came with the request
    ├── PermissionDenied        the key may not do this
    ├── BatchError              a batch job stopped before its end
    ├── CannotStart             a part of the service does not come up
    ├── ServiceUnavailable      a part of the running service is down
    └── Overloaded              a queue is full; try again later
        └── RateLimited         the key's own limit is reached
"""

from __future__ import annotations

from typing import Any


def _rebuild(cls: type[LorauterError], args: tuple[Any, ...], state: dict[str, Any]) -> LorauterError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class LorauterError(Exception):
    """Base of every error that lorauter raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class InvalidRequest(LorauterError):
    """The caller's input is wrong; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    """The prompt has more tokens than the model's context holds."""

    def __init__(self, prompt_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, but the context holds {max_tokens} and one is needed "
            "for the answer; shorten the prompt",
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens


class ConfigError(LorauterError):
    """A setting is missing, unknown or out of range; `setting` names it."""

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class TaskError(LorauterError):
    """A task or a task file does not have the documented shape; `source` says which one."""

    def __init__(self, message: str, *, source: str) -> None:
        super().__init__(f"{source}: {message}")
        self.source = source


class TaskNotFound(TaskError):
    """No task of this name is in the catalog."""

    def __init__(self, name: str) -> None:
        super().__init__("no such task; see GET /v1/tasks", source=name)


class CatalogError(LorauterError):
    """A catalog is missing, damaged, or does not fit the encoder or base model in use."""

    def __init__(self, message: str, *, uri: str) -> None:
        super().__init__(f"catalog {uri}: {message}")
        self.uri = uri


class CatalogVersionNotFound(CatalogError):
    """A catalog's store has no such version."""

    def __init__(self, version: str, *, uri: str) -> None:
        listed = "GET /v1/catalog/versions, or 'lorauter catalog versions'"
        super().__init__(f"there is no version {version[:128]!r}; see {listed}", uri=uri)


class StoreError(LorauterError):
    """An object store refused or failed."""

    def __init__(self, message: str, *, uri: str) -> None:
        super().__init__(f"{uri}: {message}")
        self.uri = uri


class ObjectNotFound(StoreError):
    """The object does not exist."""

    def __init__(self, uri: str, message: str = "no such object") -> None:
        super().__init__(message, uri=uri)


class BucketNotFound(ObjectNotFound):
    """Nor does the bucket that it would be in, or the repository."""

    def __init__(self, uri: str, bucket: str, message: str | None = None) -> None:
        super().__init__(uri, message or f"there is no bucket {bucket!r}; create it, or correct the URI")
        self.bucket = bucket


class ReadOnlyStore(StoreError):
    """The store can only be read."""

    def __init__(self, uri: str) -> None:
        super().__init__(
            "lorauter only reads from the hub; publish to a folder, s3://, gs:// or az://, or upload there by "
            "huggingface_hub ('hf upload')",
            uri=uri,
        )


class StoreUnavailable(StoreError):
    """The store did not answer, or answered with a fault of its own, after the configured retries."""


class AdapterError(LorauterError):
    """Something is wrong with one adapter; `adapter` names it."""

    def __init__(self, message: str, *, adapter: str) -> None:
        super().__init__(f"adapter {adapter!r}: {message}")
        self.adapter = adapter


class AdapterNotFound(AdapterError):
    """No adapter of this name is in the store; `param` is the option that named it, if one did."""

    param: str | None = None


class AdapterRejected(AdapterError):
    """The adapter is corrupt, of another base model, or uses something the engine does not serve."""


class AdapterUnavailable(AdapterError):
    """The adapter exists, but cannot be fetched or placed at the moment."""


class CompositionNotFound(LorauterError):
    """No composition of this id was asked for, or it is long ago."""

    def __init__(self, id: str) -> None:
        super().__init__(f"no composition {id!r}; see GET /v1/compositions")


class Conflict(LorauterError):
    """Somebody else changed the same thing meanwhile. Theirs stands; nothing was overwritten."""


class Unauthenticated(LorauterError):
    """The request carries no key, or one that nobody has."""


class PermissionDenied(LorauterError):
    """The caller is known, and has not the role that this takes."""


class BatchError(LorauterError):
    """A batch job stopped; what was written stays, and the same job started again goes on from there."""


class CannotStart(LorauterError):
    """A part of the service does not come up; `part` names it, and the message says why, in one line."""

    def __init__(self, message: str, *, part: str) -> None:
        super().__init__(message)
        self.part = part


class ServiceUnavailable(LorauterError):
    """A part of the running service is down; its replacement is on the way."""


class Overloaded(LorauterError):
    """A bounded queue is full; the work was not taken. Try again after `retry_after_s` seconds.

    `replica` is whose queue it is, if others have queues of their own.
    """

    def __init__(self, message: str, *, retry_after_s: float, replica: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.replica = replica


class RateLimited(Overloaded):
    """A key's limit of requests or tokens is reached, whatever room there is."""
