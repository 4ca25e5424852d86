"""Asks all ranks what they see and puts it together on the first one. Every wait has an end, and what did not come is
named: nothing here may hang, because what is looked for are reasons to hang."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hyena_dist.config.errors import first_sentence
from hyena_dist.config.schema import Config
from hyena_dist.runtime.launch import open_store
from hyena_dist.runtime.launcher import step_id
from hyena_dist.tasks.doctor import facts as facts_of
from hyena_dist.tasks.doctor.bandwidth import measure
from hyena_dist.tasks.doctor.diagnosis import Finding, diagnose
from hyena_dist.tasks.doctor.files import Probe, look, problem

PORT_REMEDY = "choose another: deepspeed --master_port, torchrun --master-port, or MASTER_PORT before srun"


@dataclass
class Report:
    """What the first rank found; the others' is empty."""

    ranks: int
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    bandwidth: list[dict[str, Any]] = field(default_factory=list)


class _Board:
    """Where ranks leave what they have for each other, as JSON."""

    def __init__(self, store: dist.Store) -> None:
        self.store = dist.PrefixStore(f"doctor {step_id()}", store)

    def put(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def get(self, key: str, seconds: float) -> Any:
        """Raises TimeoutError: nobody has left it in that time."""
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
        except RuntimeError as error:
            raise TimeoutError(f"{key} did not come in {seconds:.0f} s ({first_sentence(error)})") from error
        return json.loads(self.store.get(key))


def examine(environment: Mapping[str, str], config: Config | None, *, seconds: float,
            hosts: Mapping[int, str] | None = None) -> Report:
    """Look at everything, on all ranks that come.

    Args:
        environment: of this rank, as `rank_environment` gives it.
        config: names the run directory and the shards; None: they are not looked at.
        seconds: how long to wait for each thing, first of all for the other ranks.
        hosts: where each rank should be, as far as that is known.

    Raises:
        ConnectionError: this is not the first rank, and that one cannot be reached or has ended.
    """
    os.environ.update(environment)
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    own = facts_of.gather(config, seconds)
    report = Report(ranks)
    try:
        store = open_store(rank, ranks, timedelta(seconds=seconds))
    except RuntimeError as error:  # of torch's store
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if rank:
            raise ConnectionError(f"rank {rank} ({own['host']}) cannot reach rank 0 at {where} in {seconds:.0f} s "
                                  f"({first_sentence(error)}): see whether it was started and what it says") from error
        report.facts[0] = own
        found = [Finding(f"port {where} cannot be opened ({first_sentence(error)})", f"rank 0 ({own['host']})",
                         PORT_REMEDY)]
        report.findings = found + diagnose(report.facts, 1)
        return report
    board = _Board(store)
    if rank:
        _serve(board, rank, own, config, seconds)
        return report
    report.facts = _call(board, own, ranks, seconds)
    _check_clocks(board, report.facts, seconds)
    if config is not None:
        _check_directory(board, report.facts, Path(config.train.run_dir), seconds)
    whole = len(report.facts) == ranks
    board.put("measure", whole)
    if whole:
        report.bandwidth = _measure(board, report.facts, seconds)
    report.findings = diagnose(report.facts, ranks, hosts=hosts)
    board.put("end", True)
    for number in list(report.facts)[1:]:  # they are to hear of it before the store goes with this process
        _patiently(board, f"bye/{number}", 2.0)
    return report


def _call(board: _Board, own: dict[str, Any], ranks: int, seconds: float) -> dict[int, dict[str, Any]]:
    """The facts of all ranks that come in time."""
    end, found = time.monotonic() + seconds, {0: own | {"first_host": True}}
    for rank in range(1, ranks):
        fact = _patiently(board, f"facts/{rank}", end - time.monotonic())
        if fact is not None:
            found[rank] = fact | {"first_host": fact["host"] == own["host"]}
    return found


def _patiently(board: _Board, key: str, seconds: float) -> Any:
    """What is left at a key in time, or None."""
    try:
        return board.get(key, seconds)
    except TimeoutError:
        return None


def _check_clocks(board: _Board, facts: dict[int, dict[str, Any]], seconds: float) -> None:
    """Ask each rank for its time, one after the other; what the way takes is shared out between both directions."""
    for rank in list(facts)[1:]:
        asked = time.time()
        board.put(f"clock/ask/{rank}", True)
        theirs = _patiently(board, f"clock/{rank}", seconds)
        if theirs is not None:
            facts[rank]["skew"] = theirs - (asked + time.time()) / 2


def _check_directory(board: _Board, facts: dict[int, dict[str, Any]], run_dir: Path, seconds: float) -> None:
    probe = Probe(run_dir)
    made = facts_of.bounded(probe.make, seconds)
    if isinstance(made, dict):
        facts[0].setdefault("problems", []).append(problem(probe.path, made))
        made = None
    board.put("directory", made)
    for rank in list(facts)[1:] if made else []:
        found = _patiently(board, f"directory/{rank}", 2 * seconds)
        if found is None:
            found = [{"what": f"{run_dir}: no answer in {2 * seconds:.0f} s", "remedy": "look at its file server"}]
        facts[rank].setdefault("problems", []).extend(found)
    facts_of.bounded(probe.remove, seconds)


def _measure(board: _Board, facts: dict[int, dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """The rates between all ranks. Where a collective fails each rank says why: the cause may be known to one alone."""
    hosts = [facts[rank]["host"] for rank in range(len(facts))]
    board.put("hosts", hosts)
    rates, failed = _measured(board, 0, hosts, seconds)
    end = time.monotonic() + 2 * seconds
    for rank in facts:
        found = _patiently(board, f"measured/{rank}", end - time.monotonic()) if rank else failed
        if found is not None:
            facts[rank].setdefault("problems", []).append(found)
    return rates


def _measured(board: _Board, rank: int, hosts: Sequence[str],
              seconds: float) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
    """This rank's part of it: the rates, and what failed."""
    try:
        return measure(board.store, rank, hosts, seconds), None
    except RuntimeError as error:
        return [], {"what": f"a collective over all ranks failed ({first_sentence(error)})",
                    "remedy": "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that joins the hosts"}


def _serve(board: _Board, rank: int, own: dict[str, Any], config: Config | None, seconds: float) -> None:
    """The part of a rank that is not the first: it answers, and hears nothing of what was found.

    Raises:
        ConnectionError: the first rank has ended, or does not answer.
    """
    try:
        board.put(f"facts/{rank}", own)
        board.get(f"clock/ask/{rank}", 4 * seconds)
        board.put(f"clock/{rank}", facts_of.wall_clock())
        if config is not None:
            path = board.get("directory", 4 * seconds)
            if path is not None:
                found = facts_of.bounded(lambda: look(Path(path), str(rank)), seconds)
                if isinstance(found, dict):
                    found = [problem(Path(path), found)]
                board.put(f"directory/{rank}", found)
        if board.get("measure", 8 * seconds):
            board.put(f"measured/{rank}", _measured(board, rank, board.get("hosts", seconds), seconds)[1])
        board.get("end", 8 * seconds)
        board.put(f"bye/{rank}", True)
    except (RuntimeError, TimeoutError) as error:
        raise ConnectionError(f"rank {rank} ({own['host']}): rank 0 did not answer ({first_sentence(error)}): its "
                              "own output says why") from error
