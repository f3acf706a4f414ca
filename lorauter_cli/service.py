"""Where the service and its settings are: beside the library in a checkout, inside it in a wheel (`setup.py`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lorauter.defaults import SHIPPED

CONFIG_HELP = "The service's configuration; else ./serve_config.yaml, or, where there is none, the shipped one."


def make_importable() -> None:
    """Let this process, and those that it starts, import `deployments`: Ray's workers and Serve import it by name."""
    folder = str(SHIPPED)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if folder not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *known])


def shipped_config() -> Path:
    """The configuration where none is named: this folder's, or the one that comes with the package."""
    own = Path("serve_config.yaml")
    return own if own.exists() else SHIPPED / own
