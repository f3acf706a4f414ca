"""What the log says of an adapter that is made ready for an engine."""

from types import SimpleNamespace

from deployments.engines import Reading
from lorauter.adapters import LocalAdapter
from lorauter.names import AdapterKey


def test_what_an_adapter_lacks_and_what_is_ignored_is_logged_once(tmp_path, caplog) -> None:
    warnings = {"sound": (), "odd": ("has notes", "has no tensors")}
    engine = SimpleNamespace(read=lambda path, *, name, version: ((name, version), warnings[name]))
    reading = Reading(engine)
    for name in warnings:
        local = LocalAdapter(SimpleNamespace(key=AdapterKey(name, "1")), tmp_path)
        assert [reading(local) for _ in range(3)] == [(name, "1")] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "adapter 'odd': has notes",
        "adapter 'odd': has no tensors",
    ]
