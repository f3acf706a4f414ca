"""The GPU's kernels compile for one, by Triton's own compiler, which needs none: nothing is launched."""

from dataclasses import replace

import pytest
import torch
import transformers

from lorauter.engine.model import Decoder
from lorauter.engine.slots import AdapterSlots, Part, Placed
from lorauter.engine.step import Span, StepBatch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.cuda_changes import Changes
from lorauter.engine.cuda_mixtures import CudaMixtures
from lorauter.engine.cuda_step import CudaStep

ROWS = 4
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them")


class Hopper:
    """The driver of an H100 that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The names of the kernels that were, with Triton's own run in place of a launch."""
    names, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        names.append(kernel.__name__)
        return run(kernel, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    return names


@pytest.fixture(scope="module")
def decoder():
    """Of SmolLM2-135M's shape, but for its layers."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=256,
    )  # fmt: skip
    return Decoder(transformers.LlamaForCausalLM(config).bfloat16())


@pytest.mark.parametrize(("tokens", "own"), [(4, True), (4, False), (300, True), (300, False)])
def test_steps(compiled, monkeypatch, decoder, tokens, own):
    monkeypatch.setattr(CudaStep, "begin_lora", lambda *_: None)  # a stream's
    slots = AdapterSlots(decoder.shape, budget_bytes=1 << 24, max_rank=16, dtype=decoder.dtype, device=decoder.device)
    mixtures = CudaMixtures(slots.groups, decoder.shape.layers, slots.arena, ROWS + 1)
    parts = {target: Part(0, 0, 8) for target in decoder.shape.linears}
    mixtures.assign(0, [(Placed(("a", "1"), 0, parts), 1.0)])
    ids = torch.zeros(tokens, dtype=torch.int32)
    batch = StepBatch(ids, ids, ids, 1, [Span(0, 0, tokens - 1)], ids[:2], mixtures.of_step([0]), {"q_proj", "o_proj"})
    if own:
        batch = replace(batch, adapted=None, own=True)
    memory = decoder.memory(blocks=32, rows=ROWS, length=256)
    logits = decoder.forward(CudaStep(memory, batch), batch)
    board = torch.zeros(ROWS + 1, 1 + -(-decoder.vocabulary // 32), dtype=torch.int32)
    kernels.greedy(logits, ids[:2], kernels.take_tokens(ids, ids, ids[:5]), kernels.Posted(board, ids[:2], ids, ids))
    kernels.keep_rows(logits, logits, torch.zeros(1, 2, dtype=torch.int32))
    changes = Changes((*mixtures.flats, memory.table.view(-1)), mixtures.changes)
    changes.write()
    changes.written(ids[:2], ids[2:4], ids[:1])
    kinds = {"_shrink_kernel", *(("_own_norm_kernel", "_own_add_kernel") if own else ("_expand_kernel",))}
    assert kinds | {"_rotate_store_kernel", "_silu_mul_kernel", "_peaks_kernel", "_decode_kernel"} <= set(compiled)
    assert ("_live_kernel" in compiled) == (tokens > kernels.FEW_TOKENS)
