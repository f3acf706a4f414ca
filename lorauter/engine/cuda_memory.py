"""How a GPU's memory is shared out: steps and graphs take what they need, adapters what is set, the cache the rest.

Knows nothing of requests.
"""

from __future__ import annotations

import gc
import time

import torch

from lorauter.engine.blocks import blocks_of
from lorauter.engine.config import EngineConfig
from lorauter.engine.cuda_runner import CopyStream, CudaRunner, kept_logits
from lorauter.engine.cuda_step import CudaStep
from lorauter.engine.model import Decoder
from lorauter.engine.runner import Runner
from lorauter.engine.slots import AdapterSlots
from lorauter.engine.step import Span, StepBatch

_MOST_STEP_TOKENS = 8192
_LONGEST_STEP_S = 0.06  # that begins prompts while no row decodes, where no setting bounds it
_GRAPHS_BYTES = 3 << 29  # for graphs and libraries, beside what a step takes
_SHARE = 0.95  # of what is free then
_OWN_BYTES = 3 << 28  # of this process on a GPU, beside what PyTorch has there for tensors
_SAMPLING_BYTES = 37  # for each row and token of the vocabulary: penalties, what is sorted, logits that are kept


def make_cuda_runner(
    decoder: Decoder, config: EngineConfig, length: int, budget_bytes: int
) -> tuple[AdapterSlots, CudaRunner]:
    """The adapters' place on a GPU, and what runs steps there, in the memory that is free."""
    device = decoder.device
    copies = CopyStream(device)
    slots = AdapterSlots(
        decoder.shape,
        budget_bytes=budget_bytes,
        max_rank=config.max_rank,
        dtype=decoder.dtype,
        device=device,
        copy=copies,
        ahead=True,
    )
    step_tokens, step_bytes = _fit_step(decoder, slots, config)
    gc.collect()
    torch.cuda.empty_cache()
    numbers = kept_logits(config.rows, step_tokens) * decoder.dtype.itemsize + (config.rows + 1) * _SAMPLING_BYTES
    kept = 2 * step_bytes + _GRAPHS_BYTES + numbers * decoder.vocabulary
    free, total = torch.cuda.mem_get_info(device)
    kept += owed(config.spare_bytes or 0, total - free - torch.cuda.memory_reserved(device))
    free = int((free - kept) * _SHARE)
    blocks = min(free, config.cache_bytes or free) // decoder.block_bytes()
    decoder.check_blocks(blocks, length)
    runner = CudaRunner(
        decoder,
        slots,
        rows=config.rows,
        blocks=blocks,
        length=length,
        step_tokens=step_tokens,
        copies=copies,
        measure=config.step_tokens is None,
    )
    return slots, runner


def owed(spare: int, beside: int) -> int:
    """Bytes that others are to have of a GPU and have not taken yet.

    Args:
        spare: that they are to have.
        beside: that are taken there, but for this process's tensors.
    """
    return max(0, spare - max(0, beside - _OWN_BYTES))


def _fit_step(decoder: Decoder, slots: AdapterSlots, config: EngineConfig) -> tuple[int, int]:
    """Tokens of the largest step, and bytes that it takes beside the cache."""
    tokens = config.step_tokens or _MOST_STEP_TOKENS
    while True:
        runner = Runner(decoder, slots, rows=1, blocks=blocks_of(tokens), length=tokens)
        runner.memory.table[0, :] = torch.arange(1, blocks_of(tokens) + 1)
        ids = torch.zeros(tokens, dtype=torch.int32, device=decoder.device)
        positions = torch.arange(tokens, dtype=torch.int32, device=decoder.device)
        outputs = ids[: config.rows]
        batch = StepBatch(ids, ids, positions, 0, [Span(0, 0, tokens)], outputs)
        for _ in range(2):  # the first compiles
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            decoder.forward(CudaStep(runner.memory, batch), batch)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            size = torch.cuda.max_memory_allocated() - before
        if config.step_tokens or seconds <= _LONGEST_STEP_S or tokens <= 1024:
            return tokens, size
        tokens //= 2
