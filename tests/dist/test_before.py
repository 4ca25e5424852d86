"""Small trainings give the numbers of `tests/golden/before.json`, and what was written then is still read.

The file is the record of one tree and stays as it is; `python -m tests.record` makes another, to compare two trees on
one machine bit for bit.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from hyena_dist.cli.verify import main as verify
from tests.record import (
    BEFORE,
    CASES,
    GOLDEN,
    RESUMED,
    SAVED,
    STEPS,
    TENSOR,
    TOLERANCE,
    Case,
    difference,
    digest_windows,
    read_train_rows,
    record,
)

ROOT = Path(__file__).parents[2]
EXPECTED = json.loads((GOLDEN / "before.json").read_text())
CHECKPOINT = BEFORE / f"step-{SAVED:08d}"
FAST = ("fp64 sequence, attention", "zero 1, data")


def wrong(case: Case) -> Case:
    """Short convolutions of another width, a wrong model of about the same loss."""
    return replace(case, model=case.model | {"short_conv_kernel": 4})


def check(names: Iterable[str], found: dict[str, dict], *, same: bool = True) -> None:
    for name in names:
        case = CASES[name]
        error = difference(found[name], EXPECTED["cases"][name])
        print(f"{name}: losses and norms differ by {error:.1e}, tolerance {TOLERANCE[case.precision]}")
        assert len(found[name]["loss"]) == STEPS
        assert (error < TOLERANCE[case.precision]) is same, name


def check_resumed(rows: list[dict], engine: str) -> None:
    found = {key: [row[key] for row in rows] for key in ("loss", "grad_norm")}
    assert [row["step"] for row in rows] == list(range(SAVED + 1, STEPS + 1))
    error = difference(found, EXPECTED["cases"][RESUMED])
    print(f"resumed, {engine}: losses and norms differ by {error:.1e}, tolerance {TOLERANCE['fp32']}")
    assert error < TOLERANCE["fp32"]


def test_a_few_layouts_train_as_before():
    """The control: other convolutions do not."""
    name = "zero 1, data"
    found = record({**{name: CASES[name] for name in FAST}, "control": wrong(CASES[name])})
    check(FAST, found)
    check([name], {name: found["control"]}, same=False)


@pytest.mark.slow
def test_every_layout_trains_as_before():
    assert CASES.keys() == EXPECTED["cases"].keys()
    assert len(CASES) == 12
    check(CASES, record(CASES))


@pytest.mark.slow
def test_control_other_convolutions_are_seen():
    check(CASES, record({name: wrong(case) for name, case in CASES.items()}), same=False)


def test_the_shards_read_as_before():
    assert verify([str(BEFORE / "shards")]) == 0
    assert digest_windows() == EXPECTED["windows"]


def test_the_checkpoint_resumes_as_before(tmp_path):
    """In one process that no launcher started."""
    alone = {key: value for key, value in os.environ.items()
             if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    run = subprocess.run([sys.executable, "launchers/pretrain.py", "--config", str(BEFORE / "config.yaml"),
                          f"train.run_dir={tmp_path / 'run'}", f"train.resume={CHECKPOINT}"],
                         cwd=ROOT, env=alone | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    check_resumed(read_train_rows(tmp_path / "run"), "one process")


@pytest.mark.slow
def test_the_checkpoint_resumes_in_every_engine(tmp_path):
    case = CASES[RESUMED]
    cases = {f"zero {stage}": replace(case, engine=stage) for stage in range(4)} | {
        "fsdp": replace(case, engine="fsdp"), "fsdp, tensor": replace(case, engine="fsdp", parallel=TENSOR)}
    record(cases, keep=tmp_path, resume=CHECKPOINT)
    for name in cases:
        check_resumed(read_train_rows(tmp_path / name), name)
