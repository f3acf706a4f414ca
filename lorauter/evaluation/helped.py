"""Which tasks examples help, in each regime that has the task in the catalog: a file of it. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lorauter.catalog.shown import ShownExamples
from lorauter.errors import InvalidRequest
from lorauter.evaluation.regimes import REGIMES

Helped = Mapping[str, Mapping[str, ShownExamples]]
"""By regime and task."""

_FILE = "examples.json"


def write_helped(output: Path, found: Helped) -> None:
    """Write it into a folder."""
    shown = {regime: {name: one.to_json() for name, one in of.items()} for regime, of in found.items()}
    (output / _FILE).write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")


def read_helped(output: Path) -> Helped:
    """Read what `write_helped` wrote. Raises InvalidRequest."""
    try:
        found = json.loads((output / _FILE).read_bytes())
        return {
            regime: {name: ShownExamples.from_json(one) for name, one in found[regime].items()}
            for regime in REGIMES[:2]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{output} does not say which tasks examples help: {error!r}; 'lorauter eval examples' finds out"
        ) from error
