"""Whether a task's examples suit a prompt: they go before a user's one turn alone. Knows no tasks."""

from __future__ import annotations

from lorauter.engine.types import Prompt, SamplingParams
from lorauter.routing.compose import RoutingDecision
from lorauter.turns import question_of


def suited(decision: RoutingDecision, prompt: Prompt, sampling: SamplingParams) -> RoutingDecision:
    """The decision without its examples where they would be others' words in a conversation, or shaped otherwise than
    the answer has to be."""
    if question_of(prompt) is None:
        return decision.with_examples(0, "not_one_turn")
    return decision if sampling.grammar is None else decision.with_examples(0, "held")
