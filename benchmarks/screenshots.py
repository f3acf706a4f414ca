"""The README's pictures of the page, taken of a running service with the example pool.

lorauter serve &
python benchmarks/screenshots.py http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from browsing import open_browser
from playwright.sync_api import Page, expect

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZE = {"width": 1120, "height": 690}
WAIT_MS = 60_000


def ask(page: Page) -> None:
    """An answer beside its decision."""
    question = page.locator("#ask").get_by_label("Your question")
    question.fill("Translate to English: Zwei Hunde spielen im Schnee.")
    question.press("Enter")
    expect(page.locator("#ask .timings")).to_have_count(1, timeout=WAIT_MS)


def compare(page: Page) -> None:
    """The same question to three."""
    page.get_by_role("tab", name="Compare").click()
    panel = page.locator("#compare")
    panel.get_by_label("The question").fill("Translate to English: Ein Mann fährt mit dem Fahrrad durch die Stadt.")
    panel.get_by_label("Tokens at most").fill("32")
    panel.get_by_role("button", name="Compare", exact=True).click()
    expect(panel.locator(".timings")).to_have_count(3, timeout=WAIT_MS)
    page.evaluate("document.activeElement.blur()")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    url = parser.parse_args().url
    with open_browser() as browser:
        for name, show, scheme in (("ask", ask, "light"), ("compare", compare, "dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(url)
            show(page)
            page.screenshot(path=DOCS / f"page-{name}.png")
            page.close()


if __name__ == "__main__":
    main()
