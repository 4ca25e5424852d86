"""What the machine is: card, driver, versions; and the libraries that it lacks, from a folder of wheels."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "numpy", "scipy", "deepspeed", "megatron-core", "webdataset", "omegaconf", "pydantic",
             "safetensors", "tensorboard", "rich", "psutil", "pytest", "pytest-timeout", "matplotlib")
_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"cuda": cuda, "card": torch.cuda.get_device_name() if cuda else "cpu",
                  "gpus": torch.cuda.device_count(), "cuda_version": torch.version.cuda,
                  "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None}))
"""


class Unfit(Exception):
    """The check cannot run on this machine; the message says what to do."""


def install(wheels: Path, site: Path) -> None:
    """Unpack every wheel of a folder into `site`, without a network and whatever else they ask for.

    Raises:
        Unfit: there are none, or pip refuses one.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise Unfit(f"--wheels {wheels}: no wheels there: fill it with benchmarks/gpu/fetch_wheels.sh")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
               "--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(site), *map(str, found)]
    done = subprocess.run(command, capture_output=True, check=False, encoding="utf-8")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unfit(f"--wheels {wheels}: pip refuses them ({reason}): they are for CPython 3.12 on x86-64, and this is "
                    f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}")


def environment(root: Path, work: Path, site: Path | None) -> dict[str, str]:
    """Of every part: the project from its checkout, libraries from the wheels, nothing of a network."""
    mine = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), str(site or ""), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3",
        "TORCH_EXTENSIONS_DIR": str(work / "extensions"), "MPLCONFIGDIR": str(work / "matplotlib")}
    mine.pop("PYTHONDONTWRITEBYTECODE", None)  # the wheels' files are compiled once, not in every process
    return {"OMP_NUM_THREADS": "2", "GLOO_SOCKET_IFNAME": "lo", **mine}


def describe(root: Path, env: dict[str, str]) -> dict[str, Any]:
    """Card, driver, versions, cores and commit.

    Raises:
        Unfit: this Python has no torch.
    """
    probe = subprocess.run([sys.executable, "-c", _PROBE], env=env, capture_output=True, encoding="utf-8", check=False)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unfit(f"{sys.executable} cannot import torch ({reason}): use one that can, with make gpu PYTHON=...")
    found = json.loads(probe.stdout.splitlines()[-1])
    return {**found, "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "python": platform.python_version(), "cores": os.cpu_count(),
            "commit": _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"),
            "versions": _versions(env["PYTHONPATH"].split(os.pathsep))}


def slug(card: str) -> str:
    """Of a card's name, for a file's: `NVIDIA H100 80GB HBM3` is `h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ")).strip("-")


def _versions(first: list[str]) -> dict[str, str]:
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=[*first, *sys.path]):
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        installed.setdefault(name, distribution.version)  # the first one found is the one that is imported
    return {name: installed.get(name, "missing") for name in LIBRARIES}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=20, encoding="utf-8")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
