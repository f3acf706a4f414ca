"""What the log says of an adapter that is made ready for an engine."""

from types import SimpleNamespace

from deployments.engines import Packing
from lorauter.adapters import LoraWeights, ModelShape

SHAPE = ModelShape(("org/tiny-base",), 2, {"q_proj": (8, 8), "v_proj": (8, 8)})


def test_what_an_adapter_lacks_and_what_is_ignored_is_logged_once(tmp_path, make_adapter, caplog) -> None:
    engine = SimpleNamespace(
        slots=SimpleNamespace(shape=SHAPE), config=SimpleNamespace(max_rank=8), pack=lambda weights: weights.key
    )
    packing = Packing(engine)
    for name, config in (("sound", {"layers": 2}), ("odd", {"notes": "mine"})):
        weights = LoraWeights.load(make_adapter(tmp_path, name, **config), name=name, version="1")
        assert [packing(weights) for _ in range(3)] == [(name, "1")] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "adapter 'odd': adapter_config.json has notes, which PEFT does not know and ignores",
        "adapter 'odd': has no tensors for 2 of the 4 modules that it names, such as model.layers.1.self_attn.q_proj: "
        "they stay as the base model's",
    ]
