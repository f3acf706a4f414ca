"""The wheel, built from a checkout and installed where no checkout can be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LISTED = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]


@dataclass(frozen=True)
class Wheel:
    """An environment that the wheel is installed in.

    Attributes:
        bin: the folder of its commands.
        shipped: what came with the library.
        environment: the variables that its commands run with.
    """

    bin: Path
    shipped: Path
    environment: Mapping[str, str]


def install(root: Path, folder: Path) -> Wheel:
    """Build and install in an empty folder; the dependencies are those of this environment, and are not fetched."""
    for name in subprocess.run(_LISTED, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (root / name).is_file():  # of a copy: building leaves folders behind
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / "tree" / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip, python = (sys.executable, "-m", "pip", "--quiet"), folder / "env" / "bin" / "python"

    def run(*command: str | Path) -> None:
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr

    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "tree")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    [built] = folder.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", built)
    site = next((folder / "env").glob("lib/*/site-packages"))
    # Python follows no .pth file of those folders, so that an editable install there stays out of sight.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return Wheel(python.parent, site / "lorauter" / "_shipped", environment)
