"""The scoring step: how well adapters do on validation examples, by the project's own engine.

Two ways: the task's metric on a greedy answer, or the likelihood of the target, which takes one forward pass and no
decoding. Needs torch, transformers and safetensors alone. Knows nothing of which evaluations are worth making.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from lorauter.adapters.weights import LoadAdapter, LoraWeights
from lorauter.catalog.dialogues import Dialogue, check_length, dialogue_of, prompt_of, target_ids
from lorauter.catalog.scores import Evaluation, Failed, Outcome, Scorer
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine.blocks import blocks_of
from lorauter.engine.engine import MultiLoraEngine
from lorauter.engine.load import load_decoder, load_engine
from lorauter.engine.model import Decoder
from lorauter.engine.plan import Mixture, Piece, RowStart, StepPlan
from lorauter.engine.runner import Runner
from lorauter.engine.scheduler import ActiveSequence
from lorauter.engine.slots import AdapterSlots, PackedAdapter
from lorauter.engine.text import TextCodec
from lorauter.engine.types import GenerationRequest, SamplingParams
from lorauter.errors import AdapterError, AdapterNotFound, AdapterRejected, ConfigError, InvalidRequest, TaskError
from lorauter.tasks import Task

ScoredBy = Literal["metric", "likelihood"]

_LENGTH_STEP = 64  # cache lengths are multiples of it: the model keeps its rotary tables for each length
_MAX_OUTPUTS = 256  # logits held at once: a vocabulary of 128k takes 128 MiB in float32


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

    The end is any of the tokens that end an answer, their probabilities summed. Whole sequences are packed in forward
    passes of one adapter each. Adapters that cannot be loaded, do not fit the model, or make its output not finite have
    failed.

    Args:
        decoder: the base model; nothing else may run on it meanwhile.
        codec: its tokenizer.
        load_adapter: called once for every adapter of a `score` call.
        tasks: what evaluations refer to.
        batch_tokens: in one pass; also bounds its key-value cache. A longer sequence goes alone.
        max_rank: the largest adapter rank to take.
        adapter_bytes: bytes of adapters resident on the device at most.

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
        batch_tokens: int = 4096,
        max_rank: int = 128,
        adapter_bytes: int = 1 << 30,
    ) -> None:
        if not codec.eos_ids:
            raise ConfigError("the base model has no token that ends an answer", setting="base_model")
        self._decoder = decoder
        self._load_adapter = load_adapter
        self._batch_tokens = batch_tokens
        self._slots = AdapterSlots(
            decoder.shape, budget_bytes=adapter_bytes, max_rank=max_rank, dtype=decoder.dtype, device=decoder.device
        )
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
        outcomes: dict[Evaluation, Outcome] = {}
        for name, own in _by_adapter(evaluations):
            weights = _loaded(self._load_adapter, name)
            if isinstance(weights, Failed):
                outcomes |= dict.fromkeys(own, weights)
                continue
            try:
                outcomes |= self._score_adapter(weights, own)
            except (AdapterError, InvalidRequest) as error:
                outcomes |= dict.fromkeys(own, Failed(str(error)))
        return outcomes

    def _score_adapter(self, weights: LoraWeights, evaluations: Sequence[Evaluation]) -> dict[Evaluation, Outcome]:
        values = self.score_mixture([(self.pack(weights), 1.0)], [(e.task, e.example) for e in evaluations])
        return dict(zip(evaluations, values, strict=True))

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        """An adapter as `score_mixture` takes it. Raises AdapterRejected if it does not fit the model."""
        return self._slots.pack(weights)

    def score_mixture(
        self, mixture: Sequence[tuple[PackedAdapter, float]], examples: Sequence[tuple[str, int]]
    ) -> list[float]:
        """The scores of weighted adapters on examples, each a task and its number.

        Raises:
            AdapterUnavailable: the adapters do not fit the device together.
            AdapterRejected: they make the model's output not finite.
        """
        adapters = [packed for packed, _ in mixture]
        weights = tuple((packed.key, weight) for packed, weight in mixture)
        holder = ActiveSequence([], 0, 0, weights, adapters=adapters)
        self._slots.check(adapters)
        self._slots.acquire(holder)
        try:
            scores: dict[tuple[str, int], float] = {}
            for batch in self._batches(examples):
                values = self._log_likelihoods([self._dialogues[example] for example in batch], weights)
                if values is None:
                    names = ", ".join(packed.key[0] for packed in adapters)
                    raise AdapterRejected("the model's output is not finite under it", adapter=names)
                scores |= dict(zip(batch, values, strict=True))
            return [scores[example] for example in examples]
        finally:
            self._slots.release(holder)

    def _batches(self, examples: Sequence[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
        """The examples in batches that fit one pass, those of about the same length together."""
        batch: list[tuple[str, int]] = []
        outputs = 0
        for example in sorted(set(examples), key=lambda e: (len(self._dialogues[e].tokens), e)):
            dialogue = self._dialogues[example]
            outputs += dialogue.outputs
            positions = (len(batch) + 1) * _padded(len(dialogue.tokens))
            if batch and (positions > self._batch_tokens or outputs > _MAX_OUTPUTS):
                yield batch
                batch, outputs = [], dialogue.outputs
            batch.append(example)
        if batch:
            yield batch

    @torch.inference_mode()
    def _log_likelihoods(self, dialogues: Sequence[Dialogue], mixture: Mixture) -> list[float] | None:
        """The mean log-probability of each target and its end, or None if the model's output is not finite."""
        outputs: list[int] = []
        wanted: list[int] = []
        ends: list[int] = []  # which of the outputs predict the end
        starts: list[RowStart] = []
        pieces: list[Piece] = []
        blocks: list[tuple[int, int, int]] = []
        first = 0
        for row, dialogue in enumerate(dialogues):
            outputs += range(first + dialogue.prompt - 1, first + len(dialogue.tokens))
            first += len(dialogue.tokens)
            wanted += [*dialogue.tokens[dialogue.prompt :], 0]
            ends.append(len(wanted) - 1)
            starts.append(RowStart(row, mixture, SamplingParams(), 0, 0, ()))
            pieces.append(Piece(row, 0, dialogue.tokens, samples=False))
            taken = len(blocks) + 1  # block 0 is for padding
            blocks += [(row, place, taken + place) for place in range(blocks_of(len(dialogue.tokens)))]
        # A fresh cache: what a broken adapter leaves behind must reach nobody.
        length = _padded(max(len(dialogue.tokens) for dialogue in dialogues))
        runner = Runner(self._decoder, self._slots, rows=len(dialogues), blocks=len(blocks), length=length)
        logits = runner.logits(StepPlan((), starts, blocks, (), pieces), outputs)
        log_probabilities = logits.float().log_softmax(dim=-1)

        def ids(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self._decoder.device)

        chosen = log_probabilities.gather(1, ids(wanted)[:, None])[:, 0]
        chosen[ids(ends)] = log_probabilities[ids(ends)][:, self._ends].logsumexp(dim=-1)
        if not chosen.isfinite().all():
            return None
        values = iter(chosen.tolist())
        return [fmean(next(values) for _ in range(dialogue.outputs)) for dialogue in dialogues]


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


def _loaded(load_adapter: LoadAdapter, name: str) -> LoraWeights | Failed:
    """An adapter, or why it can never be used. A store that is down fails the caller, and no adapter."""
    try:
        return load_adapter(name)
    except (AdapterRejected, AdapterNotFound, InvalidRequest) as error:
        return Failed(str(error))


def _by_adapter(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, list[Evaluation]]]:
    for name, own in groupby(sorted(evaluations), key=lambda evaluation: evaluation.adapter):
        yield name, list(own)


def _check_known(evaluations: Sequence[Evaluation], known: Container[tuple[str, int]]) -> None:
    for evaluation in evaluations:
        if (evaluation.task, evaluation.example) not in known:
            raise TaskError(f"has no validation[{evaluation.example}] among the scorer's tasks", source=evaluation.task)


def _padded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP
