"""How fast an engine is, and how many requests it may hold before each of them takes too long.

Learns the seconds of a step from the steps themselves, by how many rows decode and how many prompt tokens go through,
and from both how much longer a request takes beside n - 1 others than alone; and, while requests wait, how often one
ends. Knows nothing of the model or of what is asked.
"""

from __future__ import annotations

import math

from lorauter.errors import Overloaded

_NEWEST = 0.1  # share of the newest step in what is known of steps like it
_SLOWER, _FASTER = 0.02, 0.2  # the same where one request is alone: what is slower has company outside the engine
_OUTLIER = 2.0  # times what is known: longer steps, in which the machine did something else, count as this long
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
        self._alone_step: float | None = None  # seconds, of one decoding row
        self._alone_token: float | None = None  # seconds, of a prompt's token
        self._answers = self._prompt_tokens = self._answer_tokens = 0.0
        self._full_since: float | None = None  # when the last request ended, if others have waited since then
        self._full_seconds = self._full_ends = 0.0

    def step(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step of so many decoding rows and prompt tokens."""
        if (decoding, prompt_tokens) == (1, 0):
            self._alone_step = _nearly_least(self._alone_step, seconds)
        elif not decoding and prompt_tokens:
            self._alone_token = _nearly_least(self._alone_token, seconds / prompt_tokens)
        if not prompt_tokens:
            known, seen = self._decode[decoding], self._steps[decoding]
            if known is None or seen == 1:  # the first of its size may have had to set up; the second replaces it
                self._decode[decoding] = seconds
            else:
                seconds = min(seconds, _OUTLIER * known)
                self._decode[decoding] = known + max(_NEWEST, 1 / seen) * (seconds - known)
            self._steps[decoding] += 1
            return
        self._prefill_seconds = _KEPT * self._prefill_seconds + max(0.0, seconds - self._step_seconds(decoding))
        self._prefill_tokens = _KEPT * self._prefill_tokens + prompt_tokens

    def answered(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Learn how long prompts and answers are."""
        self._answers = _KEPT * self._answers + 1
        self._prompt_tokens = _KEPT * self._prompt_tokens + prompt_tokens
        self._answer_tokens = _KEPT * self._answer_tokens + answer_tokens

    def ended(self, requests: int, waiting: int, now: float) -> None:
        """Learn that so many have been answered, and so many wait still, at a time in seconds on any steady clock."""
        if self._full_since is not None:
            self._full_seconds = _KEPT**requests * self._full_seconds + now - self._full_since
            self._full_ends = _KEPT**requests * self._full_ends + requests
        self._full_since = now if waiting else None

    @property
    def turnover_s(self) -> float:
        """Seconds between two requests' ends, or beginnings, while others wait; 0 while nothing is known.

        As it was seen, whatever else the machine did meanwhile, or else by the steps.
        """
        return (
            self._full_seconds / self._full_ends if self._full_ends else self.seconds(self._max_batch) / self._max_batch
        )

    def check(self, requests: int) -> None:
        """Raise Overloaded if this many requests, running and waiting, are too many for `max_slowdown`."""
        if self._max_slowdown is None or requests < 2:
            return
        slowdown = self.seconds(requests) / (self.seconds_alone or 1)
        if slowdown > self._max_slowdown:
            raise Overloaded(
                f"{requests - 1} requests run or wait, and beside them this one would take {slowdown:.1f} times as "
                "long as alone; try again later",
                retry_after_s=self.seconds(requests - 1),
            )

    @property
    def seconds_alone(self) -> float:
        """What a request of mean size takes on an idle machine; 0 while nothing is known."""
        if not self._answers:
            return 0.0
        seconds = self._prompt_tokens * (self._alone_token or 0.0) + self._answer_tokens * (self._alone_step or 0.0)
        return seconds / self._answers or self.seconds(1)

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
        """A step of so many decoding rows, by the line of least squares through those that were seen.

        A line, as a size that one slow step has made look bad might never be tried again.
        """
        known = [(n, seconds) for n, seconds in enumerate(self._decode) if n and seconds is not None]
        if not known or not rows:
            return 0.0
        mean_n = sum(n for n, _ in known) / len(known)
        mean_s = sum(s for _, s in known) / len(known)
        spread = sum((n - mean_n) ** 2 for n, _ in known)
        slope = sum((n - mean_n) * s for n, s in known) / spread if spread else math.inf
        slope = min(max(slope, 0.0), mean_s / mean_n)  # no row comes free of charge, or dearer than alone
        return mean_s + slope * (rows - mean_n)


def _nearly_least(known: float | None, seconds: float) -> float:
    return seconds if known is None else known + (_FASTER if seconds < known else _SLOWER) * (seconds - known)
