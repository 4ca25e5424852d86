"""Fixtures that several files share."""

import os
import random
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hyena_dist.cli.build import main as build_shards

torch.set_num_threads(1)  # as under a launcher: an operator's chunks, and so its memory, are per thread

SAMPLE = Path(__file__).parents[1] / "shards" / "sample"


def pytest_configure(config: pytest.Config) -> None:
    """Only `pytest -m gpu` sees a GPU: all other tests are of the CPU, and on a machine with one they would move there
    by themselves, where tolerances, time-outs and numbers of ranks are others."""
    # A program leaves ignored what was ignored when it started, as a background job's Ctrl-C or nohup's SIGHUP.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:  # before the fixtures of its module
    _seed(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item)


def _seed(item: pytest.Item) -> None:
    """What a test draws depends on it alone, not on those that ran before: `make test` deals files to processes as
    these get free."""
    number = zlib.crc32(item.nodeid.encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A shard directory of real bases, small enough for short runs: worm chromosomes and phiX174."""
    out = tmp_path_factory.mktemp("shards") / "small"
    status = build_shards([str(SAMPLE / "worm.fa.gz"), str(SAMPLE / "phix174.fa.gz"), "--val-fraction", "0.01",
                           "--out", str(out)])
    assert status == 0
    return out
