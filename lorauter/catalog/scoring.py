"""The scoring step: how well adapters do on validation examples, by the project's own engine.

Two ways: the task's metric on a greedy answer, or the likelihood of the target, which takes one forward pass and no
decoding. Needs torch, transformers and safetensors alone. Knows nothing of which evaluations are worth making.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from lorauter.adapters.weights import LoadAdapter, LoraWeights
from lorauter.catalog.alike import Sketch, sketch
from lorauter.catalog.dialogues import Dialogue, check_length, dialogue_of, prompt_of, target_ids
from lorauter.catalog.scores import Evaluation, Failed, Outcome, Scorer
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine.load import load_decoder, load_engine
from lorauter.engine.local import MultiLoraEngine
from lorauter.engine.lora_stack import LoraStack, stacked, stacked_bytes
from lorauter.engine.model import Decoder
from lorauter.engine.sampling import to_device
from lorauter.engine.slots import PackedAdapter, pack_weights
from lorauter.engine.step import StepBatch
from lorauter.engine.text import TextCodec
from lorauter.engine.types import GenerationRequest, SamplingParams
from lorauter.engine.whole_step import AdaptedStep
from lorauter.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    ConfigError,
    InvalidRequest,
    TaskError,
)
from lorauter.tasks import Task

ScoredBy = Literal["metric", "likelihood"]

_LENGTH_STEP = 32  # lengths are multiples of it: the model keeps its rotary tables for each length
_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
_LOGIT_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}  # of logits held at once, in float32
_KEPT_BYTES = 4 << 30  # of adapters in host memory
_RANKS = 16  # that are stacked together at least
_READERS = 4  # adapters that are read side by side


class EngineScorer:
    """Scores answers by their tasks' metrics.

    An answer may take as many tokens as twice its task's longest target and 8 more, so that an adapter that never ends
    costs little. Adapters that cannot be loaded, do not fit the model, or make its output not finite have failed.

    Args:
        engine: answers greedily, requests of many adapters in one batch.
        load_adapter: called once for every adapter of a `score` call.
        tasks: what evaluations refer to.
        max_tokens: of any answer.

    Raises:
        TaskError: an example's prompt leaves no room for an answer.
        InvalidRequest: the model has no chat template.
    """

    def __init__(
        self, engine: MultiLoraEngine, load_adapter: LoadAdapter, tasks: Sequence[Task], *, max_tokens: int = 256
    ) -> None:
        self._engine = engine
        self._load_adapter = load_adapter
        self._tasks = {task.name: task for task in tasks}
        self._prompts: dict[tuple[str, int], tuple[int, ...]] = {}
        self._sampling: dict[str, SamplingParams] = {}
        for task in tasks:
            longest = max(len(target_ids(engine.codec, example.target)) for example in task.validation)
            self._sampling[task.name] = SamplingParams(max_tokens=min(max_tokens, 2 * longest + 8))
            for i, example in enumerate(task.validation):
                prompt = self._prompts[task.name, i] = prompt_of(engine.codec, example.input)
                check_length(len(prompt) + 1, engine.max_model_len, task, i)

    def score(self, evaluations: Sequence[Evaluation]) -> dict[Evaluation, Outcome]:
        """See `Scorer.score`; in [0, 1].

        Raises:
            TaskError: an evaluation of an example that is not there.
            ConfigError: a metric's package is missing.
            AdapterUnavailable, StoreError: the adapters cannot be read just now, which is none of their failure.
        """
        from lorauter.evaluation.metrics import score  # its packages are not everyone's

        _check_known(evaluations, self._prompts)
        packed: dict[str, PackedAdapter] = {}
        outcomes: dict[Evaluation, Outcome] = {}
        for name, own in _by_adapter(evaluations):
            weights = _loaded(self._load_adapter, name)
            if isinstance(weights, Failed):
                outcomes |= dict.fromkeys(own, weights)
                continue
            try:
                packed[name] = self._engine.pack(weights)
            except (AdapterError, InvalidRequest) as error:
                outcomes |= dict.fromkeys(own, Failed(str(error)))
        for evaluation, answer in self._answers([e for e in evaluations if e.adapter in packed], packed).items():
            task = self._tasks[evaluation.task]
            target = task.validation[evaluation.example].target
            outcomes[evaluation] = answer if isinstance(answer, Failed) else score(task.metric, answer, target)
        return outcomes

    def _answers(
        self, evaluations: Sequence[Evaluation], packed: Mapping[str, PackedAdapter]
    ) -> dict[Evaluation, str | Failed]:
        requests = [
            GenerationRequest(self._prompts[e.task, e.example], ((packed[e.adapter], 1.0),), self._sampling[e.task])
            for e in evaluations
        ]
        try:
            completions = self._engine.generate(requests)
        except (AdapterError, InvalidRequest) as error:
            # One of the adapters is at fault; `generate` ends all. Halving finds it, and spares the others.
            names = sorted({evaluation.adapter for evaluation in evaluations})
            if len(names) == 1:
                return dict.fromkeys(evaluations, Failed(str(error)))
            half = set(names[: len(names) // 2])
            return self._answers([e for e in evaluations if e.adapter in half], packed) | self._answers(
                [e for e in evaluations if e.adapter not in half], packed
            )
        return {e: completion.text for e, completion in zip(evaluations, completions, strict=True)}


class LikelihoodScorer:
    """Scores by the mean log-probability of the target's tokens and of the answer's end, given the prompt.

    The end is any of the tokens that end an answer, their probabilities summed. A pass has whole sequences, each under
    an adapter of its own. Adapters that cannot be loaded, do not fit the model, or make its output not finite have
    failed.

    Args:
        decoder: the base model.
        codec: its tokenizer.
        load_adapter: called from several threads; what it reads is kept, as far as there is room.
        tasks: what evaluations refer to.
        batch_tokens: in one pass; a longer sequence goes alone. None takes what suits the device.
        max_rank: the largest adapter rank to take.
        adapter_bytes: bytes of adapters on the device at most.

    Raises:
        TaskError: an example does not fit the model's context.
        ConfigError: the tokenizer has no token that ends an answer.
        InvalidRequest: the model has no chat template.
    """

    def __init__(
        self,
        decoder: Decoder,
        codec: TextCodec,
        load_adapter: LoadAdapter,
        tasks: Sequence[Task],
        *,
        batch_tokens: int | None = None,
        max_rank: int = 128,
        adapter_bytes: int = 1 << 30,
    ) -> None:
        if not codec.eos_ids:
            raise ConfigError("the base model has no token that ends an answer", setting="base_model")
        place = decoder.device.type
        self._decoder = decoder
        self._load_adapter = load_adapter
        self._batch_tokens = batch_tokens or _BATCH_TOKENS[place]
        self._outputs = max(1, _LOGIT_BYTES[place] // (4 * decoder.vocabulary))
        self._max_rank = max_rank
        self._adapter_bytes = adapter_bytes
        self._kept: dict[str, PackedAdapter] = {}
        self._room = _KEPT_BYTES
        self._ends = torch.tensor(sorted(codec.eos_ids), device=decoder.device)
        self._dialogues: dict[tuple[str, int], Dialogue] = {}
        for task in tasks:
            for i, example in enumerate(task.validation):
                dialogue = self._dialogues[task.name, i] = dialogue_of(codec, example)
                check_length(len(dialogue.tokens), decoder.max_positions, task, i)

    def score(self, evaluations: Sequence[Evaluation]) -> dict[Evaluation, Outcome]:
        """See `Scorer.score`; natural logarithms, at most 0.

        Raises:
            TaskError, AdapterUnavailable, StoreError: as `EngineScorer.score`.
        """
        _check_known(evaluations, self._dialogues)
        by_adapter = dict(_by_adapter(evaluations))
        if seen := self._kept.keys() >= by_adapter.keys():
            by_adapter = dict(sorted(by_adapter.items(), key=lambda item: (self._shape_of(item[0]), item[0])))
        outcomes: dict[Evaluation, Outcome] = {}
        together: dict[str, PackedAdapter] = {}

        def score_together() -> None:
            rows = [(i, e) for i, name in enumerate(together) for e in by_adapter[name]]
            values = self._log_likelihoods(
                self._stacked(list(together.values())), [(i, (e.task, e.example)) for i, e in rows]
            )
            for (_, evaluation), value in zip(rows, values, strict=True):
                failed = Failed(str(_not_finite(evaluation.adapter)))
                outcomes[evaluation] = failed if value is None else value
            together.clear()

        decoder = self._decoder
        for name, adapter in self._read(by_adapter):
            if isinstance(adapter, Failed):
                outcomes |= dict.fromkeys(by_adapter[name], adapter)
                continue
            all_bytes = stacked_bytes([*together.values(), adapter], decoder.shape, decoder.dtype)
            if together:
                other = seen and self._shape_of(name) != self._shape_of(next(iter(together)))
                if other or all_bytes > self._adapter_bytes:
                    score_together()
            together[name] = adapter
        score_together()
        return outcomes

    def _shape_of(self, name: str) -> tuple[tuple[str, int], ...]:
        """What adapters have in common that are stacked without filling up much."""
        return tuple((target, -(-part.rank // _RANKS)) for target, part in sorted(self._kept[name].parts.items()))

    def _stacked(self, adapters: Sequence[PackedAdapter]) -> LoraStack:
        return stacked(adapters, self._decoder.shape, dtype=self._decoder.dtype, device=self._decoder.device)

    def look(self, names: Iterable[str]) -> dict[str, Sketch | Failed]:
        """What there is to see of adapters before they are tried: their sketches, or why they cannot be used.

        Raises:
            AdapterUnavailable, StoreError: as `score`.
        """
        shape = self._decoder.shape
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what is done to each tensor is too little to share out, and takes thrice as long
        try:
            return {
                name: packed if isinstance(packed, Failed) else sketch(packed, shape)
                for name, packed in self._read(names)
            }
        finally:
            torch.set_num_threads(threads)

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, PackedAdapter | Failed]]:
        """Adapters, a few ahead of whoever takes them, and kept."""
        names = list(names)
        for name, packed in zip(names, _ahead(self._packed, names), strict=True):
            if not isinstance(packed, Failed) and name not in self._kept and packed.nbytes <= self._room:
                self._room -= packed.nbytes
                self._kept[name] = packed
            yield name, packed

    def _packed(self, name: str) -> PackedAdapter | Failed:
        if (kept := self._kept.get(name)) is not None:
            return kept
        weights = _loaded(self._load_adapter, name)
        if isinstance(weights, Failed):
            return weights
        try:
            packed = self.pack(weights)
            self._check([packed])
            return packed
        except (AdapterError, InvalidRequest) as error:
            return Failed(str(error))

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        """An adapter as `score_mixture` takes it. Raises AdapterRejected if it does not fit the model."""
        decoder = self._decoder
        return pack_weights(weights, decoder.shape, decoder.dtype, max_rank=self._max_rank, pin=False)

    def score_mixture(
        self, mixture: Sequence[tuple[PackedAdapter, float]], examples: Sequence[tuple[str, int]]
    ) -> list[float]:
        """The scores of weighted adapters on examples, each a task and its number.

        Raises:
            AdapterUnavailable: the adapters do not fit the device together.
            AdapterRejected: they make the model's output not finite.
        """
        adapters = [packed for packed, _ in mixture]
        self._check(adapters)
        stack = self._stacked(adapters).mixed([weight for _, weight in mixture])
        values = self._log_likelihoods(stack, [(0, example) for example in examples])
        finite = [value for value in values if value is not None]
        if len(finite) < len(values):
            raise _not_finite(", ".join(packed.name for packed in adapters))
        return finite

    def _check(self, adapters: Sequence[PackedAdapter]) -> None:
        total = sum(packed.nbytes for packed in adapters)
        if total > self._adapter_bytes:
            raise AdapterUnavailable(
                f"needs {total} bytes on the device; adapter_bytes is {self._adapter_bytes}",
                adapter=", ".join(packed.name for packed in adapters),
            )

    def _log_likelihoods(self, stack: LoraStack, rows: Sequence[tuple[int, tuple[str, int]]]) -> list[float | None]:
        """Of rows, each the place of an adapter in the stack and an example, the mean log-probability of the target and
        its end, or None where the model's output is not finite."""
        found: list[float | None] = [None] * len(rows)
        batches = list(self._batches([self._dialogues[example] for _, example in rows]))
        passes = [
            self._pass(stack, [rows[i][0] for i in batch], [self._dialogues[rows[i][1]] for i in batch])
            for batch in batches
        ]
        for batch, values in zip(batches, passes, strict=True):  # the device has them all to do by now
            for i, value in zip(batch, values.tolist(), strict=True):
                found[i] = value if math.isfinite(value) else None
        return found

    def _batches(self, dialogues: Sequence[Dialogue]) -> Iterator[list[int]]:
        """The rows in batches that fit one pass, those of about the same length together."""
        batch: list[int] = []
        outputs = 0
        for i in sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].tokens)):
            outputs += dialogues[i].outputs
            positions = (len(batch) + 1) * _padded(len(dialogues[i].tokens))
            if batch and (positions > self._batch_tokens or outputs > self._outputs):
                yield batch
                batch, outputs = [], dialogues[i].outputs
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _pass(self, stack: LoraStack, adapters: Sequence[int], dialogues: Sequence[Dialogue]) -> Tensor:
        """Each row's mean log-probability, on the device."""
        device = self._decoder.device
        length = _padded(max(len(dialogue.tokens) for dialogue in dialogues))
        tokens = torch.zeros(len(dialogues), length, dtype=torch.long)
        outputs: list[int] = []
        wanted: list[int] = []
        rows: list[int] = []  # of the outputs
        ends: list[int] = []  # which of the outputs predict the end
        for row, dialogue in enumerate(dialogues):
            tokens[row, : len(dialogue.tokens)] = torch.tensor(dialogue.tokens)
            outputs += range(row * length + dialogue.prompt - 1, row * length + len(dialogue.tokens))
            wanted += [*dialogue.tokens[dialogue.prompt :], 0]
            rows += [row] * dialogue.outputs
            ends.append(len(wanted) - 1)

        def ids(values: Sequence[int] | Tensor) -> Tensor:
            return to_device(torch.as_tensor(values, dtype=torch.long), device)

        positions = torch.arange(length, device=device).repeat(len(dialogues))
        batch = StepBatch(ids(tokens.view(-1)), positions, positions, 0, (), ids(outputs))
        step = AdaptedStep(self._decoder, stack, ids(adapters), length)
        logits = self._decoder.forward(step, batch).float()
        chosen = logits.gather(1, ids(wanted)[:, None])[:, 0]
        last = ids(ends)
        chosen[last] = logits[last][:, self._ends].logsumexp(-1)
        sums = torch.zeros(len(dialogues), device=device).index_add_(0, ids(rows), chosen - logits.logsumexp(-1))
        return sums / to_device(torch.tensor([float(dialogue.outputs) for dialogue in dialogues]), device)


@contextmanager
def open_scorer(by: ScoredBy, model: str, load_adapter: LoadAdapter, tasks: Sequence[Task]) -> Iterator[Scorer]:
    """A scorer on a base model of its own: a folder, a Hugging Face id, or "default".

    Raises:
        ConfigError: the model cannot be loaded.
        TaskError, InvalidRequest: as `EngineScorer` and `LikelihoodScorer`.
    """
    if by == "likelihood":
        yield open_likelihood_scorer(model, load_adapter, tasks)
        return
    engine = load_engine(resolve_model(model), aliases=base_model_aliases(model))
    try:
        yield EngineScorer(engine, load_adapter, tasks)
    finally:
        engine.close()


def open_likelihood_scorer(model: str, load_adapter: LoadAdapter, tasks: Sequence[Task]) -> LikelihoodScorer:
    """The same, by likelihood; there is nothing to close."""
    decoder, codec = load_decoder(resolve_model(model), aliases=base_model_aliases(model))
    return LikelihoodScorer(decoder, codec, load_adapter, tasks)


def chunk_size(by: ScoredBy) -> int:
    """Evaluations that are worth making together where this process computes; by metric all of their adapters are in
    host memory at once."""
    if not torch.cuda.is_available():
        return 256
    return 16384 if by == "likelihood" else 1024


def _loaded(load_adapter: LoadAdapter, name: str) -> LoraWeights | Failed:
    """An adapter, or why it can never be used. A store that is down fails the caller, and no adapter."""
    try:
        return load_adapter(name)
    except (AdapterRejected, AdapterNotFound, InvalidRequest) as error:
        return Failed(str(error))


def _ahead(read: Callable[[str], PackedAdapter | Failed], names: Iterable[str]) -> Iterator[PackedAdapter | Failed]:
    """What is read of each name, in their order, a few ahead of whoever takes it."""
    waiting: deque[Future[PackedAdapter | Failed]] = deque()
    with ThreadPoolExecutor(_READERS) as readers:
        for name in names:
            waiting.append(readers.submit(read, name))
            if len(waiting) > _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _not_finite(adapter: str) -> AdapterRejected:
    return AdapterRejected("the model's output is not finite under it", adapter=adapter)


def _by_adapter(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, list[Evaluation]]]:
    for name, own in groupby(sorted(evaluations), key=lambda evaluation: evaluation.adapter):
        yield name, list(own)


def _check_known(evaluations: Sequence[Evaluation], known: Container[tuple[str, int]]) -> None:
    for evaluation in evaluations:
        if (evaluation.task, evaluation.example) not in known:
            raise TaskError(f"has no validation[{evaluation.example}] among the scorer's tasks", source=evaluation.task)


def _padded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP
