"""A mistake is said by one rank that sees it: the first of the world where all do, the first of a machine where the
others may have other files; and commands that read a model have the ranks that srun started, too."""

import re
from collections.abc import Callable, Sequence

import pytest

from hyena_dist.cli import embed, finetune, generate, predict, pretrain, reading, score
from hyena_dist.config.errors import ConfigError

MISSING = "/nonexistent"
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
    "pretrain": (pretrain.main, ["--config", f"{MISSING}.yaml"]),
    "finetune": (finetune.main, ["--config", f"{MISSING}.yaml"]),
    "predict": (predict.main, ["--from", MISSING, "--sequences", MISSING, "--out", "out.tsv"]),
    "embed": (embed.main, ["--from", MISSING, "--fasta", MISSING, "--out", "out.npy"]),
    "generate": (generate.main, ["--from", MISSING, "--bases", "3", "--out", "out.fa"]),
    "perplexity": (score.main, ["perplexity", "--from", MISSING, "--shards", MISSING, "--out", "out.tsv"])}


def started(monkeypatch: pytest.MonkeyPatch, tmp_path, rank: int, local: int, launcher: str) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE") if launcher == "torchrun" else (
        "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    for name, value in zip(names, (rank, local, 4), strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    if launcher == "srun":
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_STEP_ID", "0")


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_is_missing_is_named_once_on_each_machine(monkeypatch, tmp_path, capsys, name, launcher):
    """Of four ranks on two machines, as the first and the second of the second one see it."""
    command, arguments = COMMANDS[name]
    for rank, local in ((2, 0), (3, 1)):
        with monkeypatch.context() as patch:
            started(patch, tmp_path, rank, local, launcher)
            assert command(arguments) == 2
        said = capsys.readouterr().err
        assert len(re.findall(f"^error: .*{MISSING}.*$", said, re.MULTILINE)) == (local == 0), said


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_are_counted_whoever_started_them(monkeypatch, tmp_path, launcher):
    started(monkeypatch, tmp_path, 1, 1, launcher)
    reading.check_context(2)
    with pytest.raises(ConfigError, match=r"--context 3: 4 ranks cannot share a sequence by so many"):
        reading.check_context(3)


def test_a_number_of_ranks_that_is_none_is_one_line(monkeypatch, tmp_path, capsys):
    started(monkeypatch, tmp_path, 0, 0, "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "many")
    command, arguments = COMMANDS["embed"]
    assert command(arguments) == 2
    assert capsys.readouterr().err.startswith("error: the environment variable WORLD_SIZE='many' must be a whole")
