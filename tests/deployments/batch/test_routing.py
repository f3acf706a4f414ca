from deployments.batch.config import BatchConfig
from deployments.batch.routing import route_rows
from deployments.batch.rows import SourceRow, read_request
from lorauter.errors import AdapterNotFound, InvalidRequest

TEXTS = ["add numbers three", "rhyme verses of three", "add numbers " * 9, "rhyme lines"] * 12


def rows(*values):
    return [SourceRow(number, value) for number, value in enumerate(values)]


def test_each_row_is_routed_as_it_is_alone(router) -> None:
    decisions = route_rows(router, rows(*({"prompt": text} for text in TEXTS)), BatchConfig())
    for text, decision in zip(TEXTS, decisions, strict=True):
        [alone] = router.route([text])
        assert [task.name for task in decision.tasks] == [task.name for task in alone.tasks]
        assert [adapter.name for adapter in decision.adapters] == [adapter.name for adapter in alone.adapters]


def test_a_bad_row_is_an_error_in_its_place_and_a_chosen_mixture_stays(router) -> None:
    values = [{"prompt": "add numbers"}, {"prompt": ""}, {"prompt": "rhyme", "adapters": "sums"}]
    values.append({"prompt": "rhyme", "adapters": {"sums": 1, "uncatalogued": 1}})
    good, bad, chosen, unknown = route_rows(router, rows(*values), BatchConfig())
    assert good.tasks[0].name == "sums"
    assert isinstance(bad, InvalidRequest)
    assert ([a.key for a in chosen.adapters], chosen.tasks, chosen.confidence) == (
        [("sums", router.catalog.adapters["sums"])],
        (),
        None,
    )
    assert isinstance(unknown, AdapterNotFound)


def test_whatever_a_row_does_to_its_reader_is_its_own_trouble(router, monkeypatch) -> None:
    def read(row, config):
        if row.number == 1:
            raise RecursionError("too deep")
        return read_request(row, config)

    monkeypatch.setattr("deployments.batch.routing.read_request", read)
    decisions = route_rows(router, rows(*({"prompt": text} for text in TEXTS[:3])), BatchConfig())
    assert [isinstance(decision, RecursionError) for decision in decisions] == [False, True, False]


def test_one_row_that_the_router_refuses_spoils_no_other(router, monkeypatch) -> None:
    route = type(router).route

    def refusing(self, texts, options):
        if "rhyme lines" in texts:
            raise InvalidRequest("the embeddings hold NaN")
        return route(self, texts, options)

    monkeypatch.setattr(type(router), "route", refusing)
    decisions = route_rows(router, rows(*({"prompt": text} for text in TEXTS)), BatchConfig())
    assert [isinstance(decision, InvalidRequest) for decision in decisions] == [text == "rhyme lines" for text in TEXTS]
