"""Which release of a library runs, also of one that was never installed but is imported from a checkout."""

import importlib.metadata
import re
from pathlib import Path

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def library_version(name: str) -> str:
    """The release of an installed distribution; `unknown` where it has no metadata, as a checkout on PYTHONPATH."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def own_version() -> str:
    """The release of this project: that of the checkout whose code runs, else of the installed distribution."""
    if _PROJECT.is_file() and (found := re.search(r'^version = "(.+)"$', _PROJECT.read_text("utf-8"), re.MULTILINE)):
        return found[1]
    return library_version("hyena-dist")
