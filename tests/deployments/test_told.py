"""What errors tell, and whom."""

from __future__ import annotations

import pytest

from deployments.openai_answers import error_answer
from deployments.told import told, without_places
from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    CatalogError,
    ConfigError,
    InvalidRequest,
    LorauterError,
    ObjectNotFound,
    ServiceUnavailable,
    StoreUnavailable,
)

PLACES = [
    "s3://company-secrets/adapters/team-b-x/adapter.json",
    "/var/lib/lorauter/adapters/cache-0/x",
    "~/.cache/lorauter/catalogs",
    "file:///srv/adapters",
    "https://minio.internal:9000/bucket?X-Amz-Signature=1",
    r"C:\Users\me\adapters",
    "/root",
    "/srv/my data/catalog",
    "s3://bucket/(team b)/x",
    "/srv/a,b/c",
    "./stores/x",
    "../secret/x",
    r"\\server\share\x",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "form", ["{}: no such object", "[Errno 2] No such file: '{}'", "at {}.", "({}), gone", "a\n{}"]
)
def test_no_place_is_left_in_a_text(place: str, form: str) -> None:
    text = without_places(form.format(place))
    assert text == form.format("(withheld)")


@pytest.mark.parametrize(
    "text",
    [
        "no such adapter; see GET /v1/models",
        "GET /healthz needs none",
        "maps 8 to 8 features, 1/2 of 3 / 4",
        "use 1 to 128 letters, digits, '.', '_' and '-'",
        "the model org/name-1.0 and (a|b)/c",
        "adapter 'a..b': r is 0",
    ],
)
def test_what_is_no_place_stays(text: str) -> None:
    assert without_places(text) == text


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "error",
    [
        lambda place: AdapterNotFound(f"{place}: no such object", adapter="poet"),
        lambda place: AdapterUnavailable(f"the store cannot be read: {place}: down", adapter="poet"),
        lambda place: AdapterRejected(f"adapter_config.json cannot be read: '{place}'", adapter="poet"),
        lambda place: StoreUnavailable("timed out", uri=place),
        ObjectNotFound,
        lambda place: CatalogError("is damaged", uri=place),
        lambda place: ConfigError(f"{place} is no folder"),
        lambda place: InvalidRequest(f"cannot be read from {place}"),
        lambda place: ServiceUnavailable(f"the encoder does not answer: {place!r}"),
        lambda place: LorauterError(place),
        OSError,
    ],
)
def test_clients_read_no_place_and_operators_do(error: object, place: str, caplog: pytest.LogCaptureFixture) -> None:
    raised = error(place)  # type: ignore[operator]
    for audience in ("limited", "unlimited"):
        _, body = error_answer(raised, audience)
        message = body["error"]["message"]
        assert place not in message
        assert place.strip("/~") not in message
    of_the_client = isinstance(raised, (AdapterNotFound, InvalidRequest))  # its words are not for the log
    assert (place in caplog.text or repr(place) in caplog.text) == (not of_the_client)
    if isinstance(raised, LorauterError):
        assert told(raised, "operator") == str(raised)


@pytest.mark.parametrize(
    "error",
    [
        AdapterNotFound("not in the store of team-b", adapter="poet"),
        AdapterUnavailable("waits behind team-b-x", adapter="poet"),
        StoreUnavailable("team-b-x cannot be read", uri="memory"),
        CatalogError("task team-b-merger is damaged", uri="memory"),
        ConfigError("team-b"),
    ],
)
def test_who_is_limited_to_adapters_reads_no_cause_that_may_name_others(error: LorauterError) -> None:
    message = error_answer(error, "limited")[1]["error"]["message"]
    assert "team-b" not in message
    assert "team-b" in error_answer(error, "unlimited")[1]["error"]["message"]
    assert ("poet" in message) == ("poet" in str(error))


def test_no_text_is_longer_than_anybody_reads() -> None:
    error = AdapterRejected(f"was trained for {'x' * 100_000}", adapter="poet")
    for audience in ("operator", "unlimited", "limited"):
        assert len(told(error, audience)) < 2100
