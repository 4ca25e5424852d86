"""A checkout that was never installed trains, saves, converts and measures: nothing asks for its metadata."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hyena_dist.config.versions import library_version, own_version

ROOT = Path(__file__).parents[2]
SCRIPT = """
import importlib.metadata, json
real = importlib.metadata.distribution
def absent(name):  # as where the package stands on PYTHONPATH only
    if name.replace("_", "-") in ("hyena-dist", "megatron-core"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = absent
from hyena_dist.config.versions import library_version, own_version
print(json.dumps([own_version(), library_version("megatron-core"), library_version("numpy")]))
"""


def test_the_version_is_the_checkouts_without_an_installation():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [stated, "unknown", library_version("numpy")]
    assert own_version() == stated


def test_without_a_checkout_it_is_the_installed_ones(tmp_path):
    package = tmp_path / "hyena_dist" / "config"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "hyena_dist" / "config" / "versions.py", package)
    information = tmp_path / "hyena_dist-9.8.7.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hyena-dist\nVersion: 9.8.7\n")
    done = subprocess.run([sys.executable, "-c", "from hyena_dist.config.versions import own_version as v; print(v())"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "9.8.7\n"


def test_nothing_else_asks_for_metadata():
    asking = {str(path.relative_to(ROOT)) for folder in ("hyena_dist", "launchers", "benchmarks", "shards")
              for path in (ROOT / folder).rglob("*.py") if "importlib.metadata" in path.read_text()}
    # The last lists all that is installed on a machine where the project is not.
    assert asking == {"hyena_dist/config/versions.py", "benchmarks/gpu/machine.py"}
