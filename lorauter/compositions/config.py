"""How compositions are fitted and cut. Validated values, no logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lorauter.errors import ConfigError

Each = Literal["adapter", "target", "column"]
"""What has a weight of its own in a layer: an adapter, each of its targets (q, k, v ...), or each of their ranks."""


@dataclass(frozen=True)
class ComposeConfig:
    """The settings of a composition.

    Attributes:
        steps: of Adam, at most.
        check_every: steps between two looks at the examples that were left out.
        patience: looks without a better one that end a fit.
        learning_rate: of the first step; it falls to a fifth.
        folds: parts of the examples, each of which is left out of one fit.
        pull: towards the start: this times the squared distance, in the mean over layers, is added to the loss.
        each: what has a weight of its own in a layer.
        layer_groups: groups of neighbouring layers that share their weights; 0 gives each layer its own.
        non_negative: whether weights under 0 are barred.
        margin: standard errors by which a composition has to beat the default mixture on examples that were left out.
            None by default: it has seen more of them than any fold's fit, so it is better than these tell.
        margin_own: the same where an adapter that was made for the task may be used, which is seldom beaten.
        energy: share of the squared singular values that the rank has to keep.
        max_rank: of what is written, whatever share that keeps.
        seed: of the folds.
    """

    steps: int = 30
    check_every: int = 3
    patience: int = 3
    learning_rate: float = 0.04
    folds: int = 3
    pull: float = 0.0
    each: Each = "target"
    layer_groups: int = 0
    non_negative: bool = True
    margin: float = 0.0
    margin_own: float = 1.0
    energy: float = 0.99
    max_rank: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "check_every": 1, "patience": 1, "folds": 2, "layer_groups": 0, "max_rank": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(
                    f"compose.{name} is {getattr(self, name)}; it must be at least {value}", setting=f"compose.{name}"
                )
        if self.each not in get_args(Each):
            raise ConfigError(
                f"compose.each is {self.each!r}; it must be one of {', '.join(get_args(Each))}", setting="compose.each"
            )
        if self.each == "column" and self.layer_groups:
            raise ConfigError(
                f"compose.layer_groups is {self.layer_groups}, and layers share no columns; set it to 0, or "
                "compose.each to 'adapter'",
                setting="compose.layer_groups",
            )
        if not 0 < self.energy <= 1:
            raise ConfigError(
                f"compose.energy is {self.energy}; it must be over 0 and at most 1", setting="compose.energy"
            )
        if not self.learning_rate > 0 or not self.pull >= 0:
            raise ConfigError(
                f"compose.learning_rate is {self.learning_rate} and compose.pull {self.pull}; the first must be over "
                "0, and the other at least 0",
                setting="compose.learning_rate",
            )
