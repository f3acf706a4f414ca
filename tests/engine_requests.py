"""Requests to an engine, and ways to ask them beside each other."""

import asyncio

import torch

from lorauter.engine import Completion, GenerationRequest, SamplingParams

LENGTHS = [(3, 30), (40, 5), (17, 20), (1, 25), (9, 1), (30, 12), (5, 18), (23, 9)]  # prompt, answer
ENDLESS = {"max_tokens": 1 << 20, "ignore_eos": True}


def ask(text, adapters=(), **sampling):
    return GenerationRequest(tuple(text.encode("latin-1")), adapters, SamplingParams(**sampling))


def prompts():
    draw = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(256, (prompt,), generator=draw).tolist()) for prompt, _ in LENGTHS]


async def collect(engine, request):
    return Completion.of([chunk async for chunk in engine.stream(request)])


async def gather(*awaitables):
    """Their results, or what they raised."""
    return await asyncio.gather(*awaitables, return_exceptions=True)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def together(engine, *requests):
    async def run():
        return await gather(*(collect(engine, request) for request in requests))

    return asyncio.run(run())


def abreast(engine, decoder, *requests):
    """Their outcomes, when all are there before the (paced) decoder finishes a step."""

    async def run():
        tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
        await until(lambda: sum(engine.load) == len(tasks))
        decoder.permits.release(1000)
        return await gather(*tasks)

    return asyncio.run(run())
