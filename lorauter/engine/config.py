"""The engine's settings. Validated values, no logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from lorauter.errors import ConfigError
from lorauter.tools.formats import FormatSetting

DType = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Bounds:
    """What a number may be: at least, or above, `least`, and at most `most`.

    Settings that have an `EngineConfig` among them are pydantic's, which the engine does without: this tells it.
    """

    least: float
    most: float | None = None
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        bounds = {"gt" if self.above else "ge": self.least} | ({} if self.most is None else {"le": self.most})
        return {**handler(source), **bounds}

    def holds(self, value: float) -> bool:
        """Whether a number is within; none that is not a number is."""
        return (value > self.least if self.above else value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'at least'} {self.least:g}"
        return least if self.most is None else f"{least} and at most {self.most:g}"


Positive = Annotated[int, Bounds(1)]
Seconds = Annotated[float, Bounds(0, 86400, above=True)]


@dataclass(frozen=True)
class EngineConfig:
    """An engine: where it runs, and its sizes.

    Attributes:
        max_batch: sequences that run at once; None is 16 on a CPU and 128 on a GPU (see `rows`).
        max_model_len: positions of a sequence, prompt and answer together; the model's own limit bounds it.
        max_queue: requests that may wait, beside those that run; more are refused.
        max_slowdown: a request is refused if, by the speed that the engine has measured, it would take more than this
            many times as long as alone, for the company it would have in the batch and for its wait; None refuses by
            `max_queue` only, for the most throughput. It bounds the mean: the slowest of a hundred take up to half as
            long again.
        step_tokens: tokens processed in one step at most: on a CPU of prompts, beside the rows that decode (None takes
            512); on a GPU all of them, rounded up to a size that has a graph, and never fewer than `rows` (None
            takes what it does at most in twice the time of a step in which all rows decode, measured at the start).
        max_rank: the largest adapter rank served.
        adapter_bytes: bytes of adapters resident on the device at most; None takes a quarter of what is free on a
            GPU once the model is there, and 1 GiB on a CPU.
        cache_bytes: bytes of the key-value cache; None takes what is left on a GPU, and on a CPU what `max_batch`
            sequences of `max_model_len` need, 4 GiB at most.
        spare_bytes: of a GPU's memory, what other processes are to have there: what they have not taken yet is left to
            them. None leaves them what the encoders beside the engine take, where the service has them there.
        prefix_reuse: whether what was computed of a prompt is used again for prompts that begin alike, under the same
            mixture of the same versions.
        step_timeout_s: seconds that a step may take; then the engine is unhealthy.
        token_timeout_s: seconds between two tokens of a streamed answer at most; then it is ended with an error.
        device: "auto" (a GPU if there is one), "cpu", "cuda".
        dtype: "auto" is bfloat16 where the device computes in it, else float32.
        threads: CPU threads; None takes all CPUs that the process may use.
        tool_format: how the model calls tools: "auto" finds it in its chat template. "hermes", "llama", "mistral" or
            "mistral-args" says so where the template does not; with "hermes" tools are described, and calls and results
            written, in the system message and others where the template knows none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    max_batch: Positive | None = None
    max_model_len: Annotated[int, Bounds(2)] = 2048
    max_queue: Positive = 256
    max_slowdown: Annotated[float, Bounds(1, 1000, above=True)] | None = None
    step_tokens: Positive | None = None
    max_rank: Positive = 128
    adapter_bytes: Positive | None = None
    cache_bytes: Positive | None = None
    spare_bytes: Annotated[int, Bounds(0)] | None = None
    prefix_reuse: bool = True
    step_timeout_s: Seconds = 120.0
    token_timeout_s: Seconds = 300.0
    device: str = "auto"
    dtype: DType = "auto"
    threads: Positive | None = None
    tool_format: FormatSetting = "auto"

    @property
    def rows(self) -> int:
        """Sequences that run at once. With the device left to be found out, those of a CPU."""
        return self.max_batch or (16 if self.device in ("auto", "cpu") else 128)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for bounds in (extra for part in (hint, *get_args(hint)) for extra in getattr(part, "__metadata__", ())):
                if value is not None and not bounds.holds(value):
                    problem = f"engine.{name} is {value}; it must be {bounds}"
                    raise ConfigError(problem, setting=f"engine.{name}")
