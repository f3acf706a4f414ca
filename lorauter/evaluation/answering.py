"""The answering step: from a file of decisions to a file of answers, by the project's own engine.

Needs torch, transformers and safetensors alone, so that it runs on a bare GPU machine. Knows nothing of how the
decisions were made, nor of how the answers are scored.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import open_store
from lorauter.adapters.weights import LoadAdapter, LoraWeights
from lorauter.engine import GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.slots import PackedAdapter
from lorauter.errors import ContextLengthExceeded, InvalidRequest
from lorauter.evaluation.rows import AnswerRow, DecisionRow, Question, check_unique, drop_torn_line, read_answers
from lorauter.evaluation.token_routers import ROUTERS, TokenRouters
from lorauter.turns import chat_of

Asked = TypeVar("Asked")

_MAX_FUSED = 64  # fused adapters held at once: each is as large as a real one, and there may be one for every row


def answer(
    rows: Iterable[DecisionRow],
    engine: MultiLoraEngine,
    load_adapter: LoadAdapter,
    output: Path,
    *,
    chunk_size: int = 1024,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer rows greedily, one user turn each after their examples, and append the answers to `output` as they come.

    A row whose id has an answer there already is skipped, so a run that was cut off goes on where it stopped. Rows
    that ask the same of the same adapters are answered once. Prompts that leave no room for an answer, and mixtures
    under which the model's output is not finite, get an answer row with `error`.

    Args:
        load_adapter: as `adapters_in` makes it; each adapter is loaded once and then kept in host memory.
        output: a JSON lines file, made where there is none; its order is not that of the rows.
        chunk_size: questions answered between two writes.
        progress: called at the start and after each write, with the number of rows answered so far, also by earlier
            runs, and of all rows.

    Raises:
        InvalidRequest: two rows have the same id, `output` is no file of answers, or the model has no chat template
            for these messages.
        AdapterError: an adapter cannot be loaded or served; what was answered before is kept.
    """
    rows = list(rows)
    check_unique(row.id for row in rows)
    answered = _resume(output)
    pending: dict[Question, list[str]] = {}
    known: dict[Question, AnswerRow] = {}
    for row in rows:
        if row.id in answered:
            known[row.question] = answered[row.id]
        else:
            pending.setdefault(row.question, []).append(row.id)
    done = len(rows) - sum(map(len, pending.values()))
    mixtures, token_routers = _Mixtures(engine, load_adapter), TokenRouters(engine, load_adapter)
    copies = sorted(pending.keys() & known.keys(), key=_place)
    chunks = _chunks(sorted(pending.keys() - known.keys(), key=_place), chunk_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        for questions, outcomes in chain(
            [(copies, [known[question] for question in copies])],
            ((chunk, _answered(chunk, engine, mixtures, token_routers)) for chunk in chunks),
        ):
            for question, outcome in zip(questions, outcomes, strict=True):
                for row_id in pending[question]:
                    line = json.dumps(replace(outcome, id=row_id).to_json(), ensure_ascii=False)
                    file.write(line.encode() + b"\n")
                    done += 1
            file.flush()
            progress(done, len(rows))


def adapters_in(source: str | Path | AdapterRepository, versions: Mapping[str, str] | None = None) -> LoadAdapter:
    """Reads adapters from a folder of PEFT folders, a store's URI, or a repository: in these versions, else the newest.

    The function returned raises AdapterNotFound, AdapterRejected, or AdapterUnavailable.
    """
    repository = source if isinstance(source, AdapterRepository) else AdapterRepository(open_store(source))

    def load(name: str) -> LoraWeights:
        manifest = repository.manifest(name, (versions or {}).get(name))
        with tempfile.TemporaryDirectory(prefix="lorauter-") as folder:
            repository.download(manifest, Path(folder))
            return LoraWeights.load(Path(folder), name=name, version=manifest.version)

    return load


def fused(adapters: Sequence[tuple[LoraWeights, float]]) -> LoraWeights:
    """One adapter whose A and B are averages: A = sum_k w_k A_k and B = sum_k w_k s_k B_k, each on its own.

    This is LoraRetriever's "fusion" (arXiv 2402.09997), kept to compare with: its product B A has the cross terms
    w_i w_j s_i B_i A_j that a mixture of outputs has not. Smaller ranks are filled up with zeros; an adapter that
    leaves a layer alone counts as zeros there.

    Args:
        adapters: at least one, all for the same base model, with their weights w_k.
    """
    tensors = {}
    for where in sorted({where for weights, _ in adapters for where in weights.tensors}):
        pairs = [(*weights.tensors[where], weight) for weights, weight in adapters if where in weights.tensors]
        rank = max(a.shape[0] for a, _, _ in pairs)
        mean_a = torch.zeros(rank, pairs[0][0].shape[1])
        mean_b = torch.zeros(pairs[0][1].shape[0], rank)
        for a, b, weight in pairs:
            mean_a[: a.shape[0]] += weight * a.float()
            mean_b[:, : b.shape[1]] += weight * b.float()
        tensors[where] = mean_a, mean_b
    parts = json.dumps([(*weights.key, weight) for weights, weight in adapters])
    name = f"fused({', '.join(weights.name for weights, _ in adapters)})"
    return LoraWeights(name, hashlib.sha256(parts.encode()).hexdigest()[:16], adapters[0][0].base_model, tensors)


class _Mixtures:
    """Questions' adapters as the engine takes them. Real ones are kept for good, fused ones for a chunk."""

    def __init__(self, engine: MultiLoraEngine, load: LoadAdapter) -> None:
        self._engine = engine
        self._load = load
        self._packed: dict[str, PackedAdapter] = {}
        self._sources: dict[str, LoraWeights] = {}
        self._fused: dict[tuple[tuple[str, float], ...], PackedAdapter] = {}

    def begin_chunk(self) -> None:
        """Forget the fused adapters and what they were made of."""
        self._sources.clear()
        self._fused.clear()

    def of(self, question: Question) -> tuple[tuple[PackedAdapter, float], ...]:
        """Raises AdapterError."""
        if question.mixing == "matrices":
            return ((self._fused_of(question.adapters), 1.0),)
        for name, _ in question.adapters:
            if name not in self._packed:
                self._packed[name] = self._engine.pack(self._load(name))
        return tuple((self._packed[name], weight) for name, weight in question.adapters)

    def _fused_of(self, adapters: tuple[tuple[str, float], ...]) -> PackedAdapter:
        if adapters not in self._fused:
            for name, _ in adapters:
                if name not in self._sources:
                    weights = self._sources[name] = self._load(name)
                    weights.check_fits(self._engine.slots.shape, max_rank=self._engine.config.max_rank)
            fusion = fused([(self._sources[name], weight) for name, weight in adapters])
            self._fused[adapters] = self._engine.pack(fusion)
        return self._fused[adapters]


def _answered(
    questions: Sequence[Question], engine: MultiLoraEngine, mixtures: _Mixtures, token_routers: TokenRouters
) -> list[AnswerRow]:
    """The answers of a chunk, without ids."""
    mixtures.begin_chunk()
    outcomes: dict[Question, AnswerRow] = {}
    asked: dict[str, list[tuple[Question, tuple[int, ...]]]] = {}
    for question in questions:
        prompt = engine.codec.chat(chat_of(question.examples, question.input))
        if len(prompt) >= engine.max_model_len:
            outcomes[question] = _failure(ContextLengthExceeded(len(prompt), engine.max_model_len))
        else:
            asked.setdefault(question.mixing, []).append((question, prompt))
    for mixing, pairs in asked.items():
        if mixing in ROUTERS:
            rows = _halving(pairs, lambda part, m=mixing: token_routers.answer(m, part))  # type: ignore[misc]
        else:
            requests = [
                GenerationRequest(prompt, mixtures.of(question), SamplingParams(max_tokens=question.max_tokens))
                for question, prompt in pairs
            ]
            rows = _halving(requests, lambda part: _generated(part, engine))
        outcomes |= {question: row for (question, _), row in zip(pairs, rows, strict=True)}
    return [outcomes[question] for question in questions]


def _generated(requests: Sequence[GenerationRequest], engine: MultiLoraEngine) -> list[AnswerRow]:
    return [AnswerRow("", c.text, c.finish_reason, len(c.token_ids)) for c in engine.generate(requests)]


def _halving(asked: Sequence[Asked], ask: Callable[[Sequence[Asked]], list[AnswerRow]]) -> list[AnswerRow]:
    """Ask all at once. That fails as a whole, so those at fault are found by halving."""
    try:
        return ask(asked)
    except InvalidRequest as error:
        if len(asked) == 1:
            return [_failure(error)]
        half = len(asked) // 2
        return [*_halving(asked[:half], ask), *_halving(asked[half:], ask)]


def _failure(error: InvalidRequest) -> AnswerRow:
    return AnswerRow("", "", None, 0, str(error))


def _chunks(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    chunk: list[Question] = []
    fusions: set[tuple[tuple[str, float], ...]] = set()
    for question in questions:
        fused = question.mixing == "matrices"
        new = {question.adapters} - fusions if fused else set()
        if len(chunk) == size or len(fusions) + len(new) > _MAX_FUSED:
            yield chunk
            chunk, fusions = [], set()
            new = {question.adapters} if fused else set()
        chunk.append(question)
        fusions |= new
    if chunk:
        yield chunk


def _place(question: Question) -> tuple[object, ...]:
    """Sorts questions by their adapters, so that few are swapped on the device, and few fused ones held."""
    return (
        question.mixing,
        [name for name, _ in question.adapters],
        question.adapters,
        question.examples,
        question.input,
    )


def _resume(output: Path) -> dict[str, AnswerRow]:
    """The answers of earlier runs. A last line that a cut-off run has left torn is dropped from the file."""
    if not output.exists():
        return {}
    drop_torn_line(output)
    return read_answers(output)
