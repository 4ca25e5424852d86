"""Configurations that come with the project, found by name wherever it is installed."""

from pathlib import Path

import hyena_dist
from hyena_dist.config.errors import ConfigError

DIRECTORY = Path(hyena_dist.__file__).parent / "presets"
"""In a checkout a link to configs/, in an installed package a copy of it."""


def names() -> list[str]:
    """Of all presets, as in `quickstart` and `published/tiny-1k`."""
    folders = (DIRECTORY, DIRECTORY / "published", DIRECTORY / "finetune")
    return sorted(str(path.relative_to(DIRECTORY).with_suffix("")) for folder in folders
                  for path in folder.glob("*.yaml"))


def find(config: str) -> Path:
    """The file that a --config means: a path, or the name of a preset where there is no such file.

    Raises:
        ConfigError: it is neither, and not called as a YAML file would be.
    """
    path = Path(config)
    if not path.is_file() and config in names():
        return DIRECTORY / f"{config}.yaml"
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config {config}: there is no such file, and no preset of that name: use one of "
                          f"{', '.join(names())}, or the path of a YAML file")
    return path
