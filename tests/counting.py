"""A model that only counts, with a tokenizer of bytes; by name, so that engines' own processes can load it in tests."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorauter.adapters.weights import ModelShape
from lorauter.engine.blocks import BLOCK
from lorauter.engine.model import Decoder
from lorauter.engine.step import Step, StepBatch
from lorauter.engine.text import TextCodec

SPECIAL = ("<eos>", "<end>", "<start>")  # ids 256, 257 and 258, after one id for each byte
VOCABULARY = 256 + len(SPECIAL)
CHAT = "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}<end>{% endfor %}<start>assistant:"


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, the byte's value its id; then the special tokens."""
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT,
    )


class Stubborn(Exception):
    """An error that is pickled, and not read again, as an exception's own arguments are all that is kept of it."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(f"{what} {how}")


class CountingDecoder(Decoder):
    """The fake decoder: after token t comes t + 1, and "a" after "z", so that "x" is continued as "yzabc...".

    After "!" the logits are NaN, "?" makes the step raise, NUL raise what is not read again, "^" last for ever, and "~"
    ends the engine's thread.
    """

    def __init__(self) -> None:
        self.shape = ModelShape(("tiny",), 1, {"q_proj": (4, 4)})
        self.heads = self.kv_heads = self.head_dim = 1
        self.max_positions = 1 << 20
        self._embedding = torch.zeros(VOCABULARY, 1)
        self.steps: list[tuple[int, int]] = []  # decoding rows and prompt tokens

    def rotary_table(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(length, 1), torch.zeros(length, 1)

    def forward(self, step: Step, batch: StepBatch) -> torch.Tensor:
        self.steps.append((batch.decoding, sum(span.length for span in batch.spans)))
        table, keys = step._memory.table, step._memory.cache.keys[0, :, 0, :, 0]
        for row, position, token in zip(
            *(t.tolist() for t in (batch.rows, batch.positions, batch.tokens)), strict=True
        ):
            known = keys[table[row, : position // BLOCK + 1].long()].flatten()
            assert known[:position].all(), "a position was skipped"
            keys[table[row, position // BLOCK], position % BLOCK] = token
        last = batch.tokens[batch.outputs]
        if (last == ord("?")).any():
            raise RuntimeError("forward failed")
        if (last == 0).any():
            raise Stubborn("forward", "failed")
        if (last == ord("^")).any():
            time.sleep(1000)
        if (last == ord("~")).any():
            raise SystemExit
        logits = torch.zeros(len(last), VOCABULARY)
        logits[torch.arange(len(last)), torch.where(last == ord("z"), ord("a"), last + 1).clamp_max(VOCABULARY - 1)] = 9
        logits[last == ord("!")] = torch.nan
        return logits


def load() -> tuple[Decoder, TextCodec]:
    """The counting model, and a word in the log."""
    logging.getLogger("lorauter.engine").warning("it only %s", "counts")
    return CountingDecoder(), TextCodec(byte_tokenizer())


def load_without_room() -> tuple[Decoder, TextCodec]:
    """As on a GPU that is full."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def load_and_be_killed() -> tuple[Decoder, TextCodec]:
    """As on a machine that is full."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class _Unreadable(TextCodec):
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no codec",)


def load_unreadable() -> tuple[Decoder, TextCodec]:
    """What the starter cannot read."""
    return CountingDecoder(), _Unreadable(byte_tokenizer())
