import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("lorauter", "ray transformers sentence_transformers peft boto3 torch faiss numpy pydantic"),
        ("lorauter.adapters", "ray transformers sentence_transformers peft boto3 faiss"),
        ("lorauter.adapters, lorauter.catalog, lorauter.routing", "ray transformers sentence_transformers peft boto3"),
        ("lorauter.engine, lorauter.engine.types", "torch transformers"),
        # Ingress replicas and node caches hold no model: there are many of them, and they start with each node.
        ("deployments.router, deployments.retriever", "torch transformers sentence_transformers"),
        ("deployments.adapter_cache", "torch transformers sentence_transformers pandas"),
    ],
)
def test_what_an_import_does_not_load(modules, absent) -> None:
    code = f"import sys, {modules}; print(*sorted(set({absent.split()}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == []


def test_the_public_names_are_where_the_package_says() -> None:
    import lorauter

    assert {name: getattr(lorauter, name).__name__ for name in lorauter.__all__} == {n: n for n in lorauter.__all__}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lorauter.nonsense  # noqa: B018
