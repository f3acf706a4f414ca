"""Makes compositions of tasks: fits, cuts, writes, and never makes again what is there.

Every composition has a folder by what it is made of (examples, sources with versions, settings, base model), which
appears whole or not at all. Knows nothing of catalogs, nor of how mixtures to begin with come about.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorauter.adapters.weights import LoraWeights
from lorauter.catalog.dialogues import Dialogue, check_length, dialogue_of
from lorauter.catalog.provenance import task_digests
from lorauter.compositions.config import ComposeConfig
from lorauter.compositions.cut import Cutter
from lorauter.compositions.fit import Fit, Fitter, Problem, Weights
from lorauter.compositions.stack import AdapterStack
from lorauter.compositions.written import CompositionProvenance, Source, write_adapter
from lorauter.engine.model import Decoder
from lorauter.engine.text import TextCodec
from lorauter.errors import ConfigError
from lorauter.tasks import Task

_FILE = "composition.json"
_CPU_BYTES = 1 << 30  # of activations
_POSITIONS = 65536  # of a pass at most: a GPU is busy with them for longer than they take to launch
_PASSES = 2  # of a step, about: more leave more to make again after a break
_DIGITS = 4  # of a weight in the provenance

Progress = Callable[[int, int, str], None]
"""Is told how many steps of fits are made or spared, of how many, and what is going on."""


@dataclass(frozen=True)
class Wanted:
    """A composition that is to be made.

    Attributes:
        name: of the adapter that comes of it.
        mixtures: what the router answers each validation example with now.
        starts: mixtures that the fit may begin with.
        barred: adapters that may not be a source.
        own: whether an adapter that was made for the task may be one.
    """

    name: str
    task: Task
    mixtures: Sequence[Weights]
    starts: Sequence[Weights]
    barred: frozenset[str] = frozenset()
    own: bool = False


@dataclass(frozen=True)
class Made:
    """A composition on disk.

    Attributes:
        folder: the PEFT adapter's.
        margin: standard errors by which it has to beat the mixtures on examples that it has not seen.
    """

    name: str
    folder: Path
    provenance: CompositionProvenance
    margin: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.provenance.gain > self.margin * self.provenance.error


class Composer:
    """Makes compositions of one pool.

    Args:
        decoder: a plain one.
        codec: its tokenizer.
        adapters: the pool, all of which fit the model.
        base_model: its digest.
        work: where compositions lie, one folder each.

    Raises:
        ConfigError: the pool is empty, or the model has no token that ends an answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        codec: TextCodec,
        adapters: Sequence[LoraWeights],
        work: Path,
        *,
        base_model: str,
        config: ComposeConfig | None = None,
    ) -> None:
        if not adapters:
            raise ConfigError("there is no adapter to compose from", setting="adapters")
        if not codec.eos_ids:
            raise ConfigError("the base model has no token that ends an answer", setting="base_model")
        self.config = config or ComposeConfig()
        self._decoder = decoder
        self._codec = codec
        self._adapters = sorted(adapters, key=lambda adapter: adapter.name)
        self._work = work
        self._base_model = base_model

    def has(self, one: Wanted) -> bool:
        """Whether it is made already."""
        return (self._folder(one) / _FILE).is_file()

    def make(self, wanted: Sequence[Wanted], progress: Progress = lambda done, total, what: None) -> list[Made]:
        """Make what is not there yet.

        Raises:
            ConfigError: a task has but one example, from which none can be left out.
            TaskError: an example does not fit the model's context.
            InvalidRequest: the model has no chat template.
        """
        missing = [one for one in wanted if not self.has(one)]
        dialogues = {one.name: self._dialogues(one.task) for one in missing}
        steps = self.config.steps
        done, total = (len(wanted) - len(missing)) * steps, len(wanted) * steps
        progress(done, total, "")
        if missing:
            # Cutting is the CPU's work, beside the next group's fits.
            with _repeatable(self._decoder.device), ThreadPoolExecutor(1) as beside:
                limits = self._limits()
                progress(done, total, f"passes of at most {limits['tokens']} positions, {limits['outputs']} outputs")
                stack = AdapterStack(
                    self._adapters, self._decoder.shape, dtype=self._decoder.dtype, device=self._decoder.device
                )
                fitter = Fitter(self._decoder, list(self._codec.eos_ids), stack, self.config, **limits)
                cutter = Cutter(stack, energy=self.config.energy, max_rank=self.config.max_rank)
                written = []
                for group in _groups(missing, dialogues, _PASSES * limits["tokens"], self.config.folds):

                    def told(step: int, loss: float, group: Sequence[Wanted] = group, done: int = done) -> None:
                        names = ", ".join(one.task.name for one in group)
                        progress(done + step * len(group), total, f"left-out loss {loss:.4f} of {names}")

                    problems = [
                        Problem(o.task.name, dialogues[o.name], o.mixtures, o.starts, o.barred, exact=_exact(o.task))
                        for o in group
                    ]
                    for one, fit in zip(group, fitter.fit(problems, told), strict=True):
                        written.append(beside.submit(self._write, one, fit, cutter, stack))
                    done += steps * len(group)
                    progress(done, total, "")
                for each in written:
                    each.result()
        return [self._read(one) for one in wanted]

    def _dialogues(self, task: Task) -> list[Dialogue]:
        if len(task.validation) < 2:
            raise ConfigError(
                f"task {task.name!r} has one validation example; a composition needs two at least, to leave one out",
                setting="tasks",
            )
        found = [dialogue_of(self._codec, example) for example in task.validation]
        for i, dialogue in enumerate(found):
            check_length(len(dialogue.tokens), self._decoder.max_positions, task, i)
        return found

    def _limits(self) -> dict[str, int]:
        """Positions and outputs of a pass, by the memory that there is."""
        decoder = self._decoder
        ranks = sum(sum(adapter.ranks.values()) for adapter in self._adapters)
        kept = 2 * decoder.hidden + 5 * decoder.heads * decoder.head_dim + 2 * decoder.intermediate + ranks
        position = (decoder.shape.layers * kept + 20 * decoder.intermediate) * decoder.dtype.itemsize
        free = _free_bytes(decoder.device) // 2 if decoder.device.type == "cuda" else _CPU_BYTES
        return {
            "tokens": min(max(256, free // position), _POSITIONS),
            "outputs": max(64, free // (64 * decoder.vocabulary)),
        }

    def _folder(self, one: Wanted) -> Path:
        made_of = {
            "name": one.name,
            "task": task_digests([one.task]),
            "mixtures": [dict(sorted(mixture.items())) for mixture in (*one.mixtures, *one.starts)],
            "sources": [list(adapter.key) for adapter in self._adapters if adapter.name not in one.barred],
            "base_model": self._base_model,
            "config": asdict(self.config),
        }
        return self._work / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def _write(self, one: Wanted, fit: Fit, cutter: Cutter, stack: AdapterStack) -> None:
        cut = cutter.cut(fit.weights)
        provenance = CompositionProvenance(
            task=one.task.name,
            base_model=self._base_model,
            examples=task_digests([one.task])[one.task.name],
            sources=_sources(fit.weights, stack, by_target=self.config.each != "adapter"),
            targets=stack.targets,
            settings=asdict(self.config),
            score_before=-fmean(fit.before),
            score_after=-fmean(fit.after),
            error=fit.error,
            right_before=fit.right_before,
            right_after=fit.right_after,
            exact=_exact(one.task),
            energy=cut.kept,
            rank=max(a.shape[0] for a, _ in cut.pairs.values()),
            step=fit.step,
            history=tuple(round(loss, _DIGITS) for loss in fit.history),
        )
        self._work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._work, prefix=".making-") as making:
            folder = Path(making) / "whole"
            base_model = next((a.base_model for a in self._adapters if a.base_model), "")
            write_adapter(folder / one.name, cut, provenance, base_model=base_model, dtype=torch.bfloat16)
            (folder / _FILE).write_text(json.dumps(provenance.to_json()), encoding="utf-8")
            try:
                folder.rename(self._folder(one))
            except OSError:
                if not self.has(one):  # somebody else has made the same meanwhile
                    raise

    def _read(self, one: Wanted) -> Made:
        folder = self._folder(one)
        provenance = CompositionProvenance.from_json(json.loads((folder / _FILE).read_bytes()))
        margin = self.config.margin_own if one.own else self.config.margin
        return Made(one.name, folder / one.name, provenance, margin)


def _exact(task: Task) -> bool:
    """Whether its answers are right as a whole or not at all."""
    return task.metric == "em"


def _sources(columns: Tensor, stack: AdapterStack, *, by_target: bool) -> tuple[Source, ...]:
    """Weights of columns (layers, all columns) as the provenance has them."""
    means = stack.means(columns)
    found = []
    for i, adapter in enumerate(stack.sources):
        own = means[..., i]  # (layers, targets)
        if own.nan_to_num().any():
            kept = own.nan_to_num() if by_target else own.nanmean(1)
            rows = torch.round(kept, decimals=_DIGITS).tolist()
            found.append(Source(adapter.name, adapter.version, tuple(tuple(r) if by_target else r for r in rows)))
    return tuple(found)


def _groups(
    wanted: Sequence[Wanted], dialogues: Mapping[str, Sequence[Dialogue]], tokens: int, folds: int
) -> Iterator[list[Wanted]]:
    """Those of about the same length together, as many as keep the device busy."""
    sizes = {name: (folds - 1) * sum(len(d.tokens) for d in of) for name, of in dialogues.items()}
    group: list[Wanted] = []
    for one in sorted(wanted, key=lambda one: (sizes[one.name], one.name)):
        if group and sum(sizes[o.name] for o in (*group, one)) > tokens:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _free_bytes(device: torch.device) -> int:
    """Of a GPU, what this process has taken and does not use among it: an engine may have ended here before."""
    gc.collect()
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """The same numbers every time, on a GPU too."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
