"""Arrow and SpectR as ways of answering questions: text in, answers out.

Knows questions and the engine's model and tokenizer; how tokens are routed is `lorauter.evaluation.baselines`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from lorauter.adapters.weights import LoadAdapter, LoraWeights
from lorauter.engine import MultiLoraEngine
from lorauter.evaluation.baselines import Arrow, SpectR, TokenRouted
from lorauter.evaluation.baselines.routed_step import TokenRouter
from lorauter.evaluation.rows import AnswerRow, Question

ROUTERS: Mapping[str, TokenRouter] = MappingProxyType({"arrow": Arrow(), "spectr": SpectR()})
"""By the names that `lorauter.evaluation.rows.MIXINGS` gives them."""


class TokenRouters:
    """Routers over the pools that questions name, on an engine's model.

    Args:
        engine: answers nothing else meanwhile.
        load: reads adapters; each is read once.
    """

    def __init__(self, engine: MultiLoraEngine, load: LoadAdapter) -> None:
        self._engine = engine
        self._load = load
        self._weights: dict[str, LoraWeights] = {}
        self._router: tuple[tuple[str, Sequence[str]], TokenRouted] | None = None

    def answer(self, mixing: str, questions: Sequence[tuple[Question, Sequence[int]]]) -> list[AnswerRow]:
        """Greedy answers, without ids.

        Args:
            mixing: one of ROUTERS.
            questions: each with its prompt's token ids.

        Raises:
            AdapterError: an adapter cannot be loaded or served.
            InvalidRequest: the model's output is not finite under the adapters of some question.
        """
        codec = self._engine.codec
        names = sorted({name for question, _ in questions for name, _ in question.adapters})
        routed = self._routed(mixing, names)
        answers: dict[Question, AnswerRow] = {}
        for limit in sorted({question.max_tokens for question, _ in questions}):
            part = [(question, prompt) for question, prompt in questions if question.max_tokens == limit]
            allowed = torch.tensor([[name in dict(q.adapters) for name in routed.names] for q, _ in part])
            for (question, _), ids in zip(part, routed.generate([p for _, p in part], allowed, limit), strict=True):
                stream = codec.stream()
                text = "".join(stream.push(token)[0] for token in ids if token not in codec.eos_ids) + stream.flush()
                reason = "stop" if ids[-1] in codec.eos_ids else "length"
                answers[question] = AnswerRow("", text, reason, len(ids))
        return [answers[question] for question, _ in questions]

    def _routed(self, mixing: str, names: Sequence[str]) -> TokenRouted:
        if self._router is None or self._router[0] != (mixing, names):
            self._router = None  # frees the device's memory before more is asked of it
            for name in names:
                if name not in self._weights:
                    self._weights[name] = self._load(name)
            pool = [self._weights[name] for name in names]
            engine = self._engine
            routed = TokenRouted(
                engine.decoder, pool, ROUTERS[mixing], eos_ids=engine.codec.eos_ids, max_batch=engine.config.rows
            )
            self._router = (mixing, names), routed
        return self._router[1]
