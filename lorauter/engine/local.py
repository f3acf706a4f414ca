"""An engine with both sides in one process: the library's, the evaluation's and tests'. Knows how to join them."""

from __future__ import annotations

from weakref import WeakValueDictionary

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.config import EngineConfig
from lorauter.engine.core import EngineCore
from lorauter.engine.engine import Core, Engine, Told
from lorauter.engine.messages import Adapter
from lorauter.engine.model import Decoder
from lorauter.engine.plan import AdapterKey
from lorauter.engine.scheduler import Scheduler
from lorauter.engine.slots import AdapterSlots, PackedAdapter
from lorauter.engine.text import TextCodec


class MultiLoraEngine(Engine):
    """An engine in this process.

    Args:
        model: the base model.
        codec: its tokenizer.
        config: settings.

    Attributes:
        decoder: the base model. Whoever else runs on it does so while nothing is to be answered here.
        slots: the adapters on the device.
        scheduler: for its counters.
    """

    def __init__(self, model: Decoder, codec: TextCodec, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        core: list[EngineCore] = []

        def start(told: Told) -> tuple[Core, TextCodec]:
            core.append(EngineCore(model, codec, config, told))
            return core[0], codec

        super().__init__(start, config)
        self.decoder = model
        self.slots: AdapterSlots = core[0].slots
        self.scheduler: Scheduler = core[0].scheduler
        self._packed: WeakValueDictionary[AdapterKey, PackedAdapter] = WeakValueDictionary()

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        """Make an adapter ready to be used, once for many requests. Raises AdapterRejected."""
        packed = self._packed.get(weights.key)
        if packed is None:
            packed = self._packed[weights.key] = self.slots.pack(weights)
        return packed

    def _ready(self, adapter: LoraWeights | Adapter) -> Adapter:
        return self.pack(adapter) if isinstance(adapter, LoraWeights) else adapter
