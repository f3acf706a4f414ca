"""The page at `/` in a real browser, each part doing its job against the real service.

Needs Debian's chromium, which CI installs (`.ci/run`); where there is none, these tests say so and are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import CHROMIUM, open_browser
from playwright.sync_api import Browser, Locator, Page, Route, expect

from lorauter.catalog import Catalog, change_catalog, use_version, with_scores

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="needs Debian's package chromium"),
]

GERMAN = "Translate to English: Zwei Hunde spielen im Schnee."
XSS = "<img src=x onerror=alert(1)>"
SLOW_MS = 60_000
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        expect.set_options(timeout=SLOW_MS)
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`visit(url, **settings)`: the page in a context of its own, which must write no error into its console."""
    contexts, problems = [], []

    def watched(page: Page) -> Page:
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.set_default_timeout(SLOW_MS)
        return page

    def visit(url: str, **settings: Any) -> Page:
        contexts.append(browser.new_context(**settings))
        page = watched(contexts[-1].new_page())
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def accessible(page: Page, what: str) -> None:
    """Contrast, names, roles: axe finds nothing wrong."""
    # The page's own policy lets nobody add a script; axe is put in as the browser's own.
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    wrong = [(row["id"], [node["html"][:200] for node in row["nodes"]]) for row in found.response["violations"]]
    assert wrong == [], what


def part(page: Page, name: str) -> Locator:
    """A part of the page, looked at."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.locator(f"#{name.lower()}")


def test_first_load_is_small_and_all_of_the_services_own(service: Any, visit: Callable[..., Page]) -> None:
    page = visit("about:blank")
    loaded: list[tuple[str, int]] = []
    page.on("requestfinished", lambda r: loaded.append((r.url, r.sizes()["responseBodySize"])))
    page.goto(f"{service.url}/")
    expect(page.locator(".examples button")).to_have_count(6)
    assert all(url.startswith(service.url) for url, _ in loaded), loaded
    assert sum(size for _, size in loaded) < 200_000


def test_ask_a_conversation_with_its_decisions(service: Any, visit: Callable[..., Page]) -> None:
    page = visit(f"{service.url}/")
    ask = page.locator("#ask")
    ask.locator(".examples button").first.click()
    expect(ask.locator(".timings")).to_have_count(1)
    question = ask.get_by_label("Your question")
    question.fill(GERMAN)
    question.press("Enter")
    expect(ask.locator(".timings")).to_have_count(2)
    turn = ask.locator(".turn").last
    expect(turn.locator(".answer")).to_contain_text("dogs")
    expect(turn.locator("[data-verdict]")).to_have_text("sharp")
    tasks = turn.get_by_role("list", name="Likeliest tasks").first
    expect(tasks.get_by_role("listitem").first).to_contain_text("multi30k_deen")
    assert float(tasks.locator(".bar i").first.evaluate("bar => bar.getBoundingClientRect().width")) > 20
    mixture = turn.get_by_role("list", name="Mixture")
    expect(mixture.locator(".tier").first).to_have_text(re.compile("device|host|disk|peer|store"))
    expect(turn.locator(".timings")).to_contain_text(
        re.compile(r"embed \d.*retrieve \d.*queue \d.*first token \d.*tokens/s", re.S)
    )
    version = Catalog.load(service.config.catalog or "").version
    expect(turn.locator("code")).to_have_text(version[:8])

    turn.get_by_role("button", name="exclude multi30k_deen").first.click()
    ask.get_by_role("button", name="Ask again").click()
    expect(ask.locator(".timings")).to_have_count(3)
    expect(ask.locator(".turn").last.get_by_role("list", name="Likeliest tasks").first).not_to_contain_text(
        "multi30k_deen"
    )
    accessible(page, "Ask")


def test_stop_ends_an_answer_and_text_is_never_html(service: Any, visit: Callable[..., Page]) -> None:
    page = visit("about:blank")

    def answer(route: Route) -> None:
        decision = {
            "catalog_version": "v1",
            "tasks": [{"name": XSS, "score": 0.5, "probability": 1.0}],
            "adapters": [{"name": XSS, "version": XSS, "weight": 1.0, "tier": XSS}],
            "confidence": 0.5,
        }
        events = [
            {"choices": [{"delta": {"content": XSS}, "finish_reason": None}], "lorauter": decision},
            {"error": {"message": XSS}},
        ]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        route.fulfill(body=body, content_type="text/event-stream")

    page.goto(f"{service.url}/")
    ask = page.locator("#ask")
    question = ask.get_by_label("Your question")
    page.route("**/v1/chat/completions", answer)
    question.fill(XSS)
    question.press("Enter")
    expect(ask.get_by_role("alert")).to_have_text(XSS)
    for place in (".question", ".answer", ".decision .name >> nth=0", ".tier >> nth=1"):
        expect(ask.locator(place)).to_have_text(XSS)
    assert page.locator("img").count() == 0
    page.unroute("**/v1/chat/completions")

    ask.get_by_text("Options", exact=True).click()
    ask.get_by_label("Tokens at most").fill("900")
    ask.get_by_label("Answered by").select_option("base")
    question.fill("Write a long story about a river and a mountain and all who live there.")
    question.press("Enter")
    expect(ask.locator(".answer").last).not_to_be_empty()
    ask.get_by_role("button", name="Stop").click()
    expect(ask.locator(".turn").last).to_contain_text("Stopped.")
    expect(ask.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def test_compare_side_by_side(service: Any, visit: Callable[..., Page]) -> None:
    page = visit(f"{service.url}/#compare", permissions=["clipboard-read", "clipboard-write"])
    compare = page.locator("#compare")
    compare.get_by_label("The question").fill(GERMAN)
    compare.get_by_label("Tokens at most").fill("24")
    compare.get_by_label("One adapter", exact=True).check()
    compare.get_by_label("The one adapter").fill("sst2")
    compare.get_by_label("By hand", exact=True).check()
    slider = compare.get_by_label(re.compile("^Weight of")).first
    slider.focus()
    slider.press("ArrowRight")
    compare.get_by_label("Adapter", exact=True).fill("multi30k_deen")
    compare.get_by_role("button", name="Add to the mixture").click()
    expect(compare.get_by_label("Weight of multi30k_deen")).to_be_visible()
    compare.get_by_role("button", name="Compare", exact=True).click()
    expect(compare.locator(".timings")).to_have_count(5)
    verdicts = compare.locator("[data-verdict]")
    assert verdicts.all_text_contents() == ["sharp", "base", "by hand", "by hand", verdicts.last.text_content()]
    by_hand = compare.get_by_role("article", name="By hand").get_by_role("list", name="Mixture")
    expect(by_hand).to_contain_text("0.55")
    expect(by_hand).to_contain_text("multi30k_deen")
    expect(compare.get_by_role("article", name="Base model").locator(".answer mark").first).to_be_visible()
    paper = compare.get_by_role("article", name="Paper's preset")
    expect(paper.get_by_role("list", name="Mixture").get_by_role("listitem")).to_have_count(3)
    paper.get_by_role("button", name="Copy as curl").click()
    expect(paper.get_by_text("Copied")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    assert f"'{service.url}/v1/chat/completions'" in command
    body = json.loads(command.split("-d '")[1].rsplit("'", 1)[0])
    assert body["lorauter"] == {"preset": "paper"}
    assert service.ask(**body).status_code == 200
    paper.get_by_role("button", name="Copy as Python").click()
    expect(paper.get_by_role("button", name="Copied")).to_have_count(2)
    program = page.evaluate("navigator.clipboard.readText()")
    compile(program, "copied", "exec")
    assert 'extra_body={"lorauter": {"preset": "paper"}}' in program
    accessible(page, "Compare")


def test_map_places_a_question_and_shows_the_scores(service: Any, visit: Callable[..., Page]) -> None:
    before = Catalog.load(service.config.catalog or "").version
    scores = {"sst2": {"sst2": {0: 1.0, 1: 0.5}, "agnews": {0: 0.0, 1: 0.25}}, "agnews": {"agnews": {0: 1.0}}}
    change_catalog(service.config.catalog or "", lambda catalog: with_scores(catalog, scores))
    service.settle()
    try:
        page = visit(f"{service.url}/#map")
        tasks = page.locator("#map")
        expect(tasks.locator("circle[data-task]")).to_have_count(12)
        tasks.get_by_label("Where does it lie?").fill("Short movie review: a joy to watch. Is it positive or negative?")
        tasks.get_by_role("button", name="Place it").click()
        expect(tasks.get_by_role("list", name="Nearest tasks").get_by_role("listitem").first).to_contain_text("sst2")
        you, nearest, farther = (
            tasks.locator(f"circle{of}").evaluate("c => [Number(c.getAttribute('cx')), Number(c.getAttribute('cy'))]")
            for of in (".you", "[data-task=sst2]", "[data-task=dbpedia]")
        )
        assert abs(complex(*you) - complex(*nearest)) < abs(complex(*you) - complex(*farther))
        heat = tasks.get_by_role("region", name="Scores of adapters by task")
        expect(heat.get_by_role("row")).to_have_count(3)
        expect(heat.get_by_role("row", name=re.compile("^sst2"))).to_contain_text(re.compile(r"0\.\d\d"))
        accessible(page, "Map")
    finally:
        use_version(service.config.catalog or "", before)
        service.settle()


def test_a_map_of_too_many_tasks_says_so(service: Any, visit: Callable[..., Page]) -> None:
    page = visit("about:blank")
    rows = [{"id": f"t{i}", "object": "task", "domain": f"d{i % 12}", "x": i % 37, "y": i % 29} for i in range(1000)]
    answer = {"data": rows, "total": 5000, "projection": {"mean": [], "components": []}}
    page.route("**/v1/map", lambda route: route.fulfill(json=answer))
    page.goto(f"{service.url}/#map")
    expect(page.locator("#map circle[data-task]")).to_have_count(1000)
    expect(page.locator("#map")).to_contain_text("5000 tasks are too many to draw: 1000 of them are shown.")


def test_pool_is_searched_and_paged_by_the_service(service: Any, visit: Callable[..., Page]) -> None:
    assert service.ask("sst2").status_code == 200
    page = visit(f"{service.url}/#pool")
    adapters = page.get_by_role("region", name="Adapters").first
    row = adapters.get_by_role("row", name=re.compile("^sst2"))
    expect(row).to_contain_text(re.compile(r"device \d|host \d|disk \d"))
    page.get_by_label("Search adapters").fill("sst")
    expect(adapters.locator("tbody tr")).to_have_count(1)
    tasks = page.get_by_role("region", name="Tasks").first
    tasks.get_by_role("button", name="Examples of sst2").click()
    expect(tasks.get_by_role("table").nth(1).get_by_role("row")).to_have_count(21)
    accessible(page, "Pool")

    names = [f"adapter-{i:05}" for i in range(10_000)]

    def some(route: Route) -> None:
        after = re.search(r"after=([\w-]+)", route.request.url)
        start = names.index(after[1]) + 1 if after else 0
        rows = [
            {"id": n, "version": "v" * 16, "tasks": [], "resident": {}, "demand": 0} for n in names[start : start + 25]
        ]
        page_of = {"data": rows, "last_id": rows[-1]["id"], "has_more": start + 25 < len(names), "total": len(names)}
        route.fulfill(json=page_of)

    page.route("**/v1/adapters?*", some)
    page.get_by_label("Search adapters").fill("")
    pool = page.locator("#pool section").first
    expect(pool).to_contain_text("1 to 25 of 10000")
    pool.get_by_role("button", name="Next").click()
    expect(pool).to_contain_text("26 to 50 of 10000")
    expect(pool.locator("tbody tr").first).to_contain_text("adapter-00025")
    pool.get_by_role("button", name="Previous").click()
    expect(pool).to_contain_text("1 to 25 of 10000")


def test_service_reads_the_metrics(service: Any, visit: Callable[..., Page]) -> None:
    page = visit(f"{service.url}/#service")
    shown = page.locator("#service")
    expect(shown.get_by_role("row", name=re.compile("^LoraModel"))).to_contain_text("running")
    expect(shown.get_by_role("row", name=re.compile("^device"))).to_contain_text(re.compile(r"\d"))
    expect(shown.get_by_role("row", name=re.compile("^answered"))).to_contain_text(re.compile(r"\d"))
    expect(shown.get_by_role("region", name="Replicas of the model").locator("tbody tr").first).to_be_visible()
    expect(shown).to_contain_text("Of the last")  # the second reading
    accessible(page, "Service")


def test_change_with_an_admins_key(
    service: Any, secured: Any, visit: Callable[..., Page], root: Path, tmp_path: Path
) -> None:
    page = visit(secured.url)  # without the slash: the page's own addresses are relative to it
    key = page.get_by_role("dialog")
    key.get_by_label("API key").fill(secured.keys["operator"])
    key.get_by_role("button").click()
    expect(page.locator("#state")).to_contain_text("key operator")
    assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]") == [
        [secured.keys["operator"]],
        [],
        "",
    ]
    change = part(page, "Change")
    versions = change.get_by_role("region", name="Versions of the catalog")
    expect(versions.get_by_text("in use")).to_be_visible()
    before = Catalog.load(service.config.catalog or "").version
    try:
        task = change.get_by_role("form", name="Add a task")
        task.get_by_label("Name").fill("page_task")
        task.get_by_label("Domain").fill(XSS)
        task.get_by_label("Examples").fill("Is this page good? => yes\nIs that one? => no")
        task.get_by_role("button", name="Add the task").click()
        expect(task.get_by_role("status")).to_contain_text("page_task is added")
        expect(versions.locator("tbody tr").first).to_contain_text("task added: page_task")

        compose = change.get_by_role("form", name="Compose an adapter")
        compose.get_by_label("For the task").fill("page_task")
        compose.get_by_role("button", name="Compose it").click()
        expect(compose.locator("progress")).to_be_visible()
        compose.get_by_role("button", name="Cancel").click()
        expect(compose.get_by_role("status")).to_contain_text("Nothing was changed: the composition is cancelled")
        expect(compose.locator("progress")).to_be_hidden()

        upload = change.get_by_role("form", name="Upload an adapter")
        source = root / "examples" / "adapters" / "sst2"
        upload.get_by_label("Name").fill("page_task")
        upload.get_by_label("adapter_config.json").set_input_files(source / "adapter_config.json")
        upload.get_by_label("adapter_model.safetensors").set_input_files(source / "adapter_model.safetensors")
        shown = upload.locator("progress").evaluate_handle(
            "bar => { const seen = []; new MutationObserver(() => seen.push(bar.parentNode.hidden)).observe("
            "bar.parentNode, {attributes: true}); return seen; }"
        )
        upload.get_by_role("button", name="Upload it").click()
        expect(upload.get_by_role("status")).to_contain_text("It serves page_task.")
        assert shown.json_value() == [False, True], "the bar comes, and goes"

        remove = change.get_by_role("form", name="Remove")
        for kind in ("adapter", "task"):
            remove.get_by_label("What").select_option(label=kind)
            remove.get_by_label("Name").fill("page_task")
            remove.get_by_role("button", name="Remove it").click()
            page.get_by_role("dialog").get_by_role("button", name="Yes").click()
            expect(remove.get_by_role("status")).to_contain_text("page_task is removed")
        expect(versions.locator("tbody tr", has_text="in use")).to_contain_text(before)

        second = versions.locator("tbody tr", has_text="task added: page_task").first
        version = second.get_by_role("rowheader").text_content()
        second.get_by_role("button", name="Use this one").click()
        page.get_by_role("dialog").get_by_role("button", name="Yes").click()
        expect(versions.locator("tbody tr", has_text="in use")).to_contain_text(str(version))
        assert Catalog.load(service.config.catalog or "").version == version
        accessible(page, "Change")
    finally:
        use_version(service.config.catalog or "", before)
        service.settle()

    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_without_keys_nobody_may_change_anything(service: Any, visit: Callable[..., Page]) -> None:
    page = visit(f"{service.url}/#change")
    expect(page.locator("#change")).to_contain_text("nobody may change what it serves")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_by_keyboard_in_light_and_dark(service: Any, visit: Callable[..., Page], scheme: str) -> None:
    page = visit(f"{service.url}/", viewport=PHONE, color_scheme=scheme)
    expect(page.locator(".examples button")).to_have_count(6)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")
    for name in ("Ask", "Compare", "Map", "Pool", "Service", "Change"):
        tab = page.get_by_role("tab", name=name, exact=True)
        expect(tab).to_be_focused()
        expect(tab).to_have_attribute("aria-selected", "true")
        assert tab.evaluate("tab => getComputedStyle(tab).outlineStyle") == "solid"
        panel = page.get_by_role("tabpanel")
        expect(panel).to_have_count(1)
        expect(panel.locator("> *").first).to_be_visible()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{name} is {width} wide"
        accessible(page, f"{name}, {scheme}")
        page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Ask", exact=True)).to_be_focused()
