"""How fast an engine is, and how many requests it may hold before each of them takes too long.

Learns the seconds of a step from the steps themselves, by how many rows decode and how many prompt tokens go through,
and from both how much longer a request takes beside n - 1 others than alone. Knows nothing of the model or of what
is asked.
"""

from __future__ import annotations

from lorauter.errors import Overloaded

_NEWEST = 0.1  # share of the newest step in what is known of steps like it
_KEPT = 0.95  # share of what is known of prompts and of answers' lengths that stays when one more is seen


class Pace:
    """The engine's speed.

    Args:
        max_batch: rows that run at once; further requests wait.
        max_slowdown: how many times as long as alone a request may take; None refuses nobody.
    """

    def __init__(self, max_batch: int, max_slowdown: float | None) -> None:
        self._max_batch = max_batch
        self._max_slowdown = max_slowdown
        self._decode: list[float | None] = [None] * (max_batch + 1)  # seconds, by decoding rows
        self._steps = [0] * (max_batch + 1)
        self._prefill_seconds = self._prefill_tokens = 0.0
        self._answers = self._prompt_tokens = self._answer_tokens = 0.0

    def step(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step of so many decoding rows and prompt tokens."""
        if not prompt_tokens:
            known = self._decode[decoding] or 0.0
            share = max(_NEWEST, 1 / max(1, self._steps[decoding]))  # the second replaces the first, which has set up
            self._decode[decoding] = known + share * (seconds - known)
            self._steps[decoding] += 1
            return
        self._prefill_seconds = _KEPT * self._prefill_seconds + max(0.0, seconds - self._step_seconds(decoding))
        self._prefill_tokens = _KEPT * self._prefill_tokens + prompt_tokens

    def answered(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Learn how long prompts and answers are."""
        self._answers = _KEPT * self._answers + 1
        self._prompt_tokens = _KEPT * self._prompt_tokens + prompt_tokens
        self._answer_tokens = _KEPT * self._answer_tokens + answer_tokens

    def check(self, requests: int) -> None:
        """Raise Overloaded if this many requests, running and waiting, are too many for `max_slowdown`."""
        if self._max_slowdown is None or requests < 2:
            return
        slowdown = self.seconds(requests) / (self.seconds(1) or 1)
        if slowdown > self._max_slowdown:
            raise Overloaded(
                f"{requests - 1} requests run or wait, and beside them this one would take {slowdown:.1f} times as "
                "long as alone; try again later",
                retry_after_s=self.seconds(requests - 1),
            )

    def seconds(self, requests: int) -> float:
        """What a request of mean size takes, from its arrival to its last token, where this many always are there.

        While one decodes its answer, each of the rows beside it takes in one prompt; who finds no row waits its turn
        (Little's law: as many times as long as there are requests for a row).
        """
        if not self._answers:
            return 0.0
        rows = min(requests, self._max_batch)
        prompt, answer = self._prompt_tokens / self._answers, self._answer_tokens / self._answers
        per_token = self._prefill_seconds / self._prefill_tokens if self._prefill_tokens else 0.0
        return requests / rows * (answer * self._step_seconds(rows) + rows * prompt * per_token)

    def _step_seconds(self, rows: int) -> float:
        """A step of so many decoding rows; between those seen in proportion, beyond them as if rows shared nothing."""
        if rows == 0:
            return 0.0
        below = next(((n, s) for n in range(rows, 0, -1) if (s := self._decode[n]) is not None), None)
        above = next(((n, s) for n in range(rows, len(self._decode)) if (s := self._decode[n]) is not None), None)
        if below is None:
            return above[1] if above is not None else 0.0
        if above is None:
            return below[1] * rows / below[0]
        if above[0] == below[0]:
            return below[1]
        return below[1] + (above[1] - below[1]) * (rows - below[0]) / (above[0] - below[0])
