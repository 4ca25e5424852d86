"""Scoring variants costs little more than the forward passes of its windows, its memory does not grow with the number
of variants, and a process that is killed leaves nothing that changes the file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import long_scoring
from benchmarks.scoring import Size, memory, run, score_and_measure, trained_of, turns, write_inputs
from hyena_dist.cli.score import main
from hyena_dist.convert import write_model
from hyena_dist.data.reference import read_reference
from hyena_dist.data.variants import Site, Variants
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.score import variants as task
from hyena_dist.tasks.score.observe import score_sites
from tests.dist.harness import fork_server
from tests.processes import kill

ROOT = Path(__file__).parents[2]
TINY = Size(32, 8, 1)
BAR = 0.05
"""How much more memory many variants may take than few."""


def score_and_keep(rank: int, variants: int, shared: str) -> None:
    """As `score_and_measure`, but every row of the file is kept."""
    judged, kept = task.judge, list[Any]()

    def keeping(*args: Any) -> Iterator[Any]:
        for each in judged(*args):
            if len(kept) < variants:
                kept.append(each)
            yield each

    task.judge = keeping
    score_and_measure(rank, variants, shared)
    assert len(kept) == variants


def request_of(directory: Path, out: Path) -> task.Request:
    return task.Request(Variants(directory / "variants.vcf", is_vcf=True), read_reference(directory / "reference.fa"),
                        out, TINY.length, "reference.fa")


def _dies(directory: Path) -> None:
    """Score variants, and be killed when three parts are there."""
    scored: list[int] = []

    def until_the_end(*args: Any, **kwargs: Any) -> Any:
        scored.append(1)
        if len(scored) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_sites(*args, **kwargs)

    task.score_sites = until_the_end
    task.score_variants(trained_of(TINY), request_of(directory, directory / "killed.tsv"), Groups.single())


def test_a_process_killed_by_the_system_leaves_parts_that_the_next_goes_on_with(tmp_path: Path) -> None:
    write_inputs(tmp_path, 400, TINY)
    task.score_variants(trained_of(TINY), request_of(tmp_path, tmp_path / "whole.tsv"), Groups.single())
    process = fork_server().Process(target=_dies, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed.tsv").exists()
    assert len(list((tmp_path / "killed.tsv.parts").glob("*.npz"))) == 3
    result = task.score_variants(trained_of(TINY), request_of(tmp_path, tmp_path / "killed.tsv"), Groups.single())
    assert 0 < result.scored_now < 400
    assert (tmp_path / "killed.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()


def test_a_part_keeps_the_variants_of_a_window_together(tmp_path: Path) -> None:
    """So each reference window is made once; a part has its end where all variants share one."""
    _, sites = write_inputs(tmp_path, 300, TINY)
    request = request_of(tmp_path, tmp_path / "o.tsv")
    found = task.survey(task._judged(request), request.reference, "variants.vcf")
    parts = list(task._chunks(request, found))
    assert [site.at for part in parts for site in part] == [site.at for site in sites]
    assert len({site.at for part in parts for site in part}) == sum(len({site.at for site in part}) for part in parts)
    assert [len(part) for part in parts[:-1]] == [66] * 4
    whole = Site(0, 20, 5, 1, sites[0].alt)  # its window is the whole sequence, whatever the place
    together = request.__class__(**{**vars(request), "window": 200})
    assert task.window_of(whole, 200) == task.window_of(whole._replace(at=9), 200)
    assert [len(part) for part in task._chunks(together, found)][0] <= 128


def test_both_sides_of_the_measurement_read_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank-0").mkdir()
    windows, sides = turns(TINY, 150, Groups.single(), tmp_path / "rank-0")
    assert windows == 2 * (150 + 50)
    seen: list[int] = []
    monkeypatch.setattr(task, "score_sites", lambda *args, **kwargs: score_sites(
        *args, **kwargs, on_windows=seen.append))
    for work in sides.values():
        work(0)
    assert sum(seen) == windows


@pytest.mark.slow
def test_scoring_costs_at_most_1_15_times_the_forward_passes() -> None:
    """Measured: 0.98 to 1.02, of the processors' seconds."""
    rows = {row.side: row for row in run(Size(), variants=150, ranks=1, rounds=3)}
    assert rows["score variants"].ratio <= 1.15
    assert rows["forward passes"].ratio == 1


@pytest.mark.slow
def test_a_long_measurement_goes_on_in_its_directory(tmp_path: Path) -> None:
    first = long_scoring.run(TINY, variants=300, ranks=2, directory=tmp_path)
    assert [row.windows for row in first] == [2 * (300 + 100)] * 2
    whole = (tmp_path / "scores.tsv").read_bytes()
    again = long_scoring.run(TINY, variants=300, ranks=2, directory=tmp_path)
    assert again[1].seconds == first[1].seconds > 0, "it was done, and is not scored again"
    (tmp_path / "scores.tsv").unlink()
    third = long_scoring.run(TINY, variants=300, ranks=1, directory=tmp_path)
    assert third[1].seconds > first[1].seconds, "the seconds of all calls count"
    assert (tmp_path / "scores.tsv").read_bytes() == whole
    assert third[1].peak_MiB > 100
    assert long_scoring.problem(TINY, 300, tmp_path) is None
    assert "was begun with" in str(long_scoring.problem(TINY, 301, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_number_of_variants() -> None:
    """Measured: 523 to 524 and 532 to 535 MiB. The list of the variants that were seen takes the most of what is
    more, and a part of a long file, which has four times as many variants as that of a short one."""
    few, many = memory(1_000), memory(100_000)
    kept = memory(50_000, score_and_keep)
    print(f"{few.peak_MiB:.1f} and {many.peak_MiB:.1f} MiB; {kept.peak_MiB:.1f} where every row is kept")
    assert abs(many.peak_MiB / few.peak_MiB - 1) <= BAR
    assert kept.peak_MiB / few.peak_MiB - 1 > BAR, "the control"


@pytest.mark.slow
def test_two_ranks_killed_in_the_middle_leave_the_same_file(tmp_path: Path) -> None:
    write_inputs(tmp_path, 3000, Size(64, 32, 2))
    model = trained_of(Size(64, 32, 2))
    write_model(tmp_path / "model", "safetensors", model.section, model.model)
    arguments = ["variants", "--from", str(tmp_path / "model"), "--vcf", str(tmp_path / "variants.vcf"), "--fasta",
                 str(tmp_path / "reference.fa"), "--out"]
    assert main([*arguments, str(tmp_path / "one.tsv")]) == 0
    out, environment = tmp_path / "two.tsv", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "launchers/score.py", *arguments, str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    parts, deadline = tmp_path / "two.tsv.parts", time.monotonic() + 300
    while len(list(parts.glob("*.npz"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    kill(tree)
    process.wait()
    psutil.wait_procs(tree, 60)
    assert not out.exists()
    assert 3 <= len(list(parts.glob("*.npz"))) < 3000 // 66
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert out.read_bytes() == (tmp_path / "one.tsv").read_bytes()
    assert json.loads(task.cost_path(out).read_text())["variants_scored_by_rank_0"] < 1500
