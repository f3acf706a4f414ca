"""A step of the GPU's kernels computes what transformers does, in Triton's interpreter: it has a process of its own."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import pass_in_the_interpreter

from lorauter.engine import runner
from lorauter.engine.slots import AdapterSlots

LIMIT_S = 600  # the interpreter's
LENGTHS = [(3, 4), (1, 2), (2, 3)]  # prompt and whole sequence
MIXTURES = [
    (("attention", -0.7), ("mlp-rslora", 1.6), ("patterns", 1.1)),
    (),
    (("mlp-rslora", 0.2), ("mlp-rslora", 0.5)),
]


class Cases:
    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    def test_tokens_multiply_their_own_columns(self, monkeypatch, pool, forced, run_forced, kind):
        from lorauter.engine import cuda_step
        from lorauter.engine.cuda_changes import Changes
        from lorauter.engine.cuda_mixtures import CudaMixtures
        from lorauter.engine.cuda_step import CudaStep

        class Written(CudaMixtures):
            def of_step(self, rows):
                Changes((*self.flats, self.flats[0][:0]), self.changes).write()
                return super().of_step(rows)

        stream = SimpleNamespace(wait_stream=lambda _: None)
        monkeypatch.setattr(cuda_step, "_second_stream", lambda _: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(runner, "step_class", lambda _: lambda memory, b: CudaStep(memory, replace(b, own=True)))
        monkeypatch.setattr(
            runner.Runner,
            "_new_mixtures",
            lambda self, rows: Written(self._slots.groups, self.decoder.shape.layers, self._slots.arena, rows + 1),
        )
        decoder = pool.decoder(kind)
        slots = AdapterSlots(
            decoder.shape, budget_bytes=1 << 20, max_rank=64, dtype=decoder.dtype, device=decoder.device
        )
        sequences = forced(LENGTHS, [pool.mix(mixture) for mixture in MIXTURES])
        logits = run_forced(decoder, sequences, slots=slots)
        for got, sequence, mixture in zip(logits, sequences, MIXTURES, strict=True):
            with torch.inference_mode():
                expected = pool.merged(kind, mixture)(torch.tensor([sequence.tokens])).logits[0]
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, with_fixtures=True)
