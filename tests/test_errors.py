import copy
import pickle

import pytest

from lorauter import errors

ERRORS = {
    errors.LorauterError("odd"): {},
    errors.InvalidRequest("odd", param="top_k"): {"param": "top_k"},
    errors.ContextLengthExceeded(9000, 2048): {
        "prompt_tokens": 9000,
        "max_tokens": 2048,
        "param": None,
    },
    errors.ConfigError("odd", setting="cache.disk_bytes"): {"setting": "cache.disk_bytes"},
    errors.TaskError("odd", source="tasks/x.json"): {"source": "tasks/x.json"},
    errors.TaskNotFound("sums"): {"source": "sums"},
    errors.CatalogError("odd", uri="s3://b/c"): {"uri": "s3://b/c"},
    errors.CatalogVersionNotFound("0f", uri="s3://b/c"): {"uri": "s3://b/c"},
    errors.StoreError("odd", uri="s3://b/k"): {"uri": "s3://b/k"},
    errors.ObjectNotFound("s3://b/k"): {"uri": "s3://b/k"},
    errors.BucketNotFound("s3://b/k", "b"): {"uri": "s3://b/k", "bucket": "b"},
    errors.ReadOnlyStore("hf://a/b"): {"uri": "hf://a/b"},
    errors.StoreUnavailable("odd", uri="s3://b"): {"uri": "s3://b"},
    errors.AdapterError("odd", adapter="sst2"): {"adapter": "sst2"},
    errors.AdapterNotFound("odd", adapter="sst2"): {"adapter": "sst2"},
    errors.AdapterRejected("odd", adapter="sst2"): {"adapter": "sst2"},
    errors.AdapterUnavailable("odd", adapter="sst2"): {"adapter": "sst2"},
    errors.BatchError("odd"): {},
    errors.CompositionNotFound("0f"): {},
    errors.Conflict("odd"): {},
    errors.CannotStart("odd", part="LoraModel"): {"part": "LoraModel"},
    errors.Unauthenticated("odd"): {},
    errors.PermissionDenied("odd"): {},
    errors.ServiceUnavailable("odd"): {},
    errors.Overloaded("odd", retry_after_s=1.5): {"retry_after_s": 1.5, "replica": None},
    errors.Overloaded("odd", retry_after_s=1.5, replica="r0"): {"retry_after_s": 1.5, "replica": "r0"},
    errors.RateLimited("odd", retry_after_s=1.5): {"retry_after_s": 1.5, "replica": None},
}


def test_every_class_is_tried_here() -> None:
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LorauterError)}
    assert {type(error) for error in ERRORS} == classes


@pytest.mark.parametrize("how", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_with_its_message_and_fields(error, how) -> None:
    again = how(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == ERRORS[error] == vars(error)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.ContextLengthExceeded(9000, 2048), ["9000", "2048", "shorten"]),
        (errors.TaskError("odd", source="tasks/x.json"), ["tasks/x.json", "odd"]),
        (errors.ObjectNotFound("s3://b/k"), ["s3://b/k", "no such object"]),
        (errors.AdapterRejected("odd", adapter="sst2"), ["'sst2'", "odd"]),
    ],
)
def test_the_message_names_what_it_is_about(error, said) -> None:
    assert [part for part in said if part not in str(error)] == []


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (errors.ContextLengthExceeded, errors.InvalidRequest),
        (errors.ObjectNotFound, errors.StoreError),
        (errors.BucketNotFound, errors.ObjectNotFound),
        (errors.ReadOnlyStore, errors.StoreError),
        (errors.StoreUnavailable, errors.StoreError),
        (errors.AdapterNotFound, errors.AdapterError),
        (errors.AdapterRejected, errors.AdapterError),
        (errors.AdapterUnavailable, errors.AdapterError),
    ],
)
def test_what_callers_catch_together(error, base) -> None:
    assert issubclass(error, base)
