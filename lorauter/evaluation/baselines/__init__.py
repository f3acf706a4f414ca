"""Routing baselines that no fixed adapter weights per query can express. Import torch alone; know no tasks or text."""

from lorauter.evaluation.baselines.arrow import Arrow
from lorauter.evaluation.baselines.lorahub import lorahub_weights
from lorauter.evaluation.baselines.spectr import SpectR
from lorauter.evaluation.baselines.token_routed import TokenRouted

__all__ = ["Arrow", "SpectR", "TokenRouted", "lorahub_weights"]
