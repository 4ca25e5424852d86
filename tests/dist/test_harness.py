"""The harness itself: results, failures and hangs of ranks."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.harness import run_distributed


def _act(how: str) -> int:
    rank = dist.get_rank()
    if how == "fail" and rank == 1:
        raise ArithmeticError("the cause")
    if how == "hang" and rank == 1:
        time.sleep(600)
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    return 10 * int(total) + rank


def test_results_come_by_rank() -> None:
    assert run_distributed(_act, 2, "well") == [30, 31]


def test_the_failing_rank_is_shown_and_the_others_are_killed() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*ArithmeticError: the cause"):
        run_distributed(_act, 2, "fail")


def test_a_hang_ends() -> None:
    with pytest.raises((TimeoutError, RuntimeError)):
        run_distributed(_act, 2, "hang", timeout=5)
