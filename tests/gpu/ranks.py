"""Runs a function on several ranks of a device: over NCCL on CUDA, where ranks may share a GPU, else over gloo."""

import os
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.nccl import shared_gpu
from hyena_dist.runtime.launch import init_distributed
from tests.dist.harness import run_distributed, run_rank

ATTEMPTS = 3


def run_ranks(device: torch.device, fn: Callable[..., Any], ranks: int, *args: Any,
              environments: list[dict[str, str]] | None = None, timeout: float = 120.0) -> list[Any]:
    """The results of `fn(device, *args)` on ranks that have a process group, `device` being that of the rank.

    Args:
        environments: of each rank on CUDA; None: all are on the first GPU, as hosts of their own for NCCL.
    """
    if device.type == "cpu":
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # they are forked: from a process without a GPU
            return run_distributed(fn, ranks, device, *args, timeout=timeout)
    for attempt in range(ATTEMPTS):
        main = partial(_nccl_rank, environments or shared_gpu(ranks), _free_port())
        try:
            return run_distributed(fn, ranks, *args, timeout=timeout, main=main)
        except RuntimeError as error:
            # Between the look and its use another run of the machine may take the port.
            if "another run has the port" not in str(error) or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _nccl_rank(environments: list[dict[str, str]], port: int, fn: Callable[..., Any], rank: int, world_size: int,
               directory: str, timeout: float, args: tuple[Any, ...]) -> None:
    """A rank as a launcher would start it."""
    os.environ.update(environments[rank], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    selected: list[torch.device] = []
    run_rank(lambda: selected.append(init_distributed(timedelta(seconds=timeout))),
             lambda *given: fn(*selected, *given), rank, world_size, directory, args)


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
