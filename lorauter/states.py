"""The seam of hidden states: texts in, what an instruct model holds as it is about to answer them.

A state is the model's hidden state at the last token of a chat of one user turn, after a half, seven and nine tenths
of its layers: what kind of answer it is going to give shows there. The model need not be the base model; a small one
tells as well, and costs less. Knows nothing of what the states are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lorauter.catalog.whitening import States
from lorauter.errors import ConfigError, InvalidRequest
from lorauter.uris import called

_DEPTHS = (0.5, 0.7, 0.9)  # of 9, 15, 21, 27 and 30 layers of 30, those that tell
_MOST_TOKENS = 480  # the last of a prompt, where its question mostly is
_MOST_CHARS = 16_000  # of a text; as many tokens of more letters there are not
_LARGEST = float(np.finfo(np.float16).max)


class StateModel(Protocol):
    """Turns texts into hidden states."""

    @property
    def name(self) -> str:
        """What the model is called, for messages and records."""

    def states(self, texts: Sequence[str]) -> States:
        """Those of n texts: (n, layers, width); NaN for a text that the model cannot be asked."""


class PromptStates:
    """An instruct model of the kinds that the engine runs.

    Args:
        model: a folder, or a Hugging Face id.
        device: "auto" is the GPU if there is one, else the CPU.
        threads: CPU threads; None takes all.

    Raises:
        ConfigError: it cannot be loaded, is not served, or has no chat template.
    """

    def __init__(self, model: str, *, device: str = "auto", threads: int | None = None) -> None:
        from lorauter.engine.load import load_decoder  # seconds to import
        from lorauter.engine.prompts import PromptReader

        decoder, codec = load_decoder(model, device=device, threads=threads)
        if not codec.chats:
            raise ConfigError(
                f"{model!r} has no chat template, so its states cannot be asked for; name an instruct model",
                setting="state_model",
            )
        layers = sorted({max(1, round(depth * decoder.shape.layers)) for depth in _DEPTHS})
        self._codec = codec
        self._reader = PromptReader(decoder, layers, length=_MOST_TOKENS)
        self.name = called(model)

    def states(self, texts: Sequence[str]) -> States:
        """See `StateModel.states`."""
        prompts = list(map(self._prompt, texts))
        read = self._reader.states([prompt for prompt in prompts if prompt]).float().cpu().numpy()
        found = np.full((len(texts), *read.shape[1:]), np.nan, np.float32)
        found[[i for i, prompt in enumerate(prompts) if prompt]] = read
        return np.clip(found, -_LARGEST, _LARGEST).astype(np.float16)

    def _prompt(self, text: str) -> tuple[int, ...]:
        """A chat's tokens; none where the template refuses it."""
        try:
            return self._codec.chat([{"role": "user", "content": text[-_MOST_CHARS:]}])[-_MOST_TOKENS:]
        except InvalidRequest:
            return ()


class RememberingStates:
    """A model that reads each text once."""

    def __init__(self, model: StateModel) -> None:
        self.name = model.name
        self._model = model
        self._known: dict[str, States] = {}

    def states(self, texts: Sequence[str]) -> States:
        """See `StateModel.states`."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._model.states(new), strict=True))
        return np.stack([self._known[text] for text in texts])
