"""What the HTTP API takes, for people and machines: the table in `docs/api.md`, made of the table of options.

`python -m deployments.openapi` writes it there.
"""

from __future__ import annotations

from pathlib import Path

from deployments.openai_types import ENDPOINTS
from deployments.options import table

DOCS = Path(__file__).parents[1] / "docs" / "api.md"
_BEGIN, _END = "<!-- options: python -m deployments.openapi -->\n", "<!-- end -->\n"


def with_table(text: str) -> str:
    """The documentation with the table as it is now."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    names = {path.removeprefix("/v1/"): kind for path, kind in ENDPOINTS.items()}
    return f"{before}{_BEGIN}{table(names)}{_END}{after}"


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
