import os
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
        ("deployments.router, deployments.retriever", "torch transformers sentence_transformers scipy"),
        ("deployments.adapter_cache", "torch transformers sentence_transformers pandas"),
        # Nor do those who have an engine in a process of its own, which loads PyTorch while they wait.
        ("deployments.app, deployments.batch.job", "torch sentence_transformers scipy"),
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


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_look_for_work_before_they_sleep_unless_the_environment_says_otherwise(given) -> None:
    names = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"]
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = f"import os, lorauter; print(*(os.environ.get(name, '-') for name in {names}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    settled = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
    expected = given if "OMP_WAIT_POLICY" in given else settled | given
    assert said.stdout.split() == [expected.get(name, "-") for name in names]
