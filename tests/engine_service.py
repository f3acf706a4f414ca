"""A service that answers by an engine in process, as a replica does."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fake_service import FakeService

from deployments.calls import Admitted, GenerateCall
from deployments.choices import side_by_side
from lorauter.engine import Chunk, GenerationRequest, MultiLoraEngine


class EngineService(FakeService):
    """Answers by an engine, as a replica does."""

    def __init__(self, engine: MultiLoraEngine) -> None:
        super().__init__()
        self.engine = engine

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        codec = self.engine.codec
        self.calls.append(call)
        prompt = codec.encode(call.prompt)
        stream = side_by_side(
            {
                place: self.engine.stream(
                    GenerationRequest(prompt, (), call.sampling.of_choice(place), generated, call.tenant)
                )
                for place, generated in call.choices
            }
        )
        told = tuple((token, codec.bytes_of(token)) for token in prompt) if call.tells_prompt else ()
        try:
            first = await anext(stream)
            format = codec.tool_format if call.prompt.tools else None
            yield Admitted(len(prompt), prompt=told, tool_format=None if format is None else format.name)
            yield first
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()
