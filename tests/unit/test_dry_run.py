"""pretrain.py --dry-run: what is wrong is refused, what is only missing on this machine is a warning."""

from pathlib import Path

import pytest
import torch

from hyena_dist.cli import dry_run
from hyena_dist.cli.pretrain import main
from hyena_dist.config.errors import is_out_of_memory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dry(monkeypatch, capsys, tmp_path):
    """Runs --dry-run of the quickstart in an empty directory; returns status, configuration, and lines of errors."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*overrides, config=str(ROOT / "configs/quickstart.yaml"), **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        status = main(["--config", config, *overrides, "--dry-run"])
        said = capsys.readouterr()
        return status, said.out, said.err.splitlines()

    return run


def refusal(result):
    status, printed, lines = result
    assert (status, printed, len(lines)) == (2, "", 1), result
    return lines[0]


def test_what_is_missing_here_is_a_warning_with_its_remedy(dry, tmp_path):
    status, printed, lines = dry("train.resume=elsewhere/step-00000007")
    assert status == 0
    assert printed.startswith("model:\n")
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert "data.shards=shards/quickstart is not on this machine: build it with `python shards/build.py" in warnings[0]
    assert "train.resume=elsewhere/step-00000007 is not on this machine: copy it there" in warnings[1]
    assert lines[2].startswith("note: by formula each rank needs ")
    assert "add --gpu NAME to compare it with one" in lines[2]
    assert lines[3:] == ["note: checked for 1 rank, the fewest that it can have: put WORLD_SIZE=N before the command "
                         "to check it for N"]
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_missing_here_is_a_warning(dry, monkeypatch):
    monkeypatch.setattr("hyena_dist.train.weights_and_biases.find_spec", lambda _: None)
    status, _, lines = dry("train.wandb=mine")
    assert status == 0
    assert sum("train.wandb=mine: wandb is missing: install it with pip install" in line for line in lines) == 1
    assert not any("wandb" in line for line in dry()[2])


def test_ranks_are_those_that_are_asked_for_or_the_fewest(dry):
    assert "context = 3 does not divide the 8 ranks: start 6" in refusal(dry("parallel.context=3", WORLD_SIZE="8"))
    assert "global_batch_size (8) is not a multiple of train.micro_batch_size 4 x 8" in refusal(dry(WORLD_SIZE="8"))
    assert "note: checked" not in "".join(dry(WORLD_SIZE="2")[2])
    assert "WORLD_SIZE='x' must be a whole number" in refusal(dry(WORLD_SIZE="x"))
    assert "DEEPSPEED_TIMEOUT='soon' must be" in refusal(dry(WORLD_SIZE="2", DEEPSPEED_TIMEOUT="soon"))


def test_without_ranks_the_fewest_are_checked(dry):
    status, _, lines = dry("parallel.context=2", "parallel.tensor=2")
    assert status == 0
    assert "note: checked for 4 ranks" in lines[-1]
    assert refusal(dry("parallel.context=2", "parallel.overlap_groups=3"))


def test_shards_are_read(dry, shards, tmp_path):
    status, _, lines = dry(f"data.shards={shards}")
    assert (status, any("data.shards" in line for line in lines)) == (0, False)
    lines = dry(f"data.shards={shards}", "data.seq_len=900000", "model.max_seq_len=900000", "data.val_seq_len=20")[2]
    assert any("data.seq_len (900000) is more than the longest stretch of split train" in line for line in lines)
    (tmp_path / "empty").mkdir()
    assert "shards.json: cannot be read" in refusal(dry("data.shards=empty"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "shards.json").write_text("{}")
    assert "damaged/shards.json: " in refusal(dry(f"data.shards={damaged}"))


def test_shards_without_validation_are_told(dry, tmp_path):
    from hyena_dist.cli.build import main as build
    (tmp_path / "a.fa").write_text(">a\n" + "ACGT" * 2000 + "\n")
    assert build(["a.fa", "--out", "all"]) == 0
    status, _, lines = dry("data.shards=all")
    assert status == 0
    assert any("no bases of split val: every validation loss will be nan: build" in line for line in lines)


def test_the_run_directory_is_looked_at(dry, tmp_path):
    (tmp_path / "file").touch()
    assert "train.run_dir=file/run: " in refusal(dry("train.run_dir=file/run"))
    assert "is no directory: choose another" in refusal(dry("train.run_dir=file"))


def test_a_run_directory_without_permission_by_the_systems_answer(dry, tmp_path, monkeypatch):
    """Also as root: what the system says of it."""
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(dry_run.os, "access", lambda path, _: "locked" not in str(path))
    assert "get permission to write there" in refusal(dry("train.run_dir=locked/run"))
    status, _, lines = dry("train.run_dir=locked/a/b/run")
    assert status == 0, "the directories between may be there on another machine"
    assert any("may not be written to on this machine" in line for line in lines)


def test_what_is_no_checkpoint_is_refused(dry, tmp_path):
    (tmp_path / "step-00000001").mkdir()
    assert "step-00000001" in refusal(dry("train.resume=step-00000001"))
    (tmp_path / "run" / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert "train.run_dir=run holds a run that cannot go on" in refusal(dry("train.run_dir=run"))


def test_a_library_that_is_not_here_is_a_warning(dry, monkeypatch):
    monkeypatch.setattr("hyena_dist.ops.backends._installed", lambda: False)
    status, _, lines = dry("ops.backend=triton")
    assert status == 0
    assert any("on this machine: ops.backend=triton needs Triton, which is not ins" in line for line in lines)
    assert not any("Triton" in line for line in dry()[2])


def test_of_the_ranks_of_a_launcher_the_first_speaks(dry):
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert dry(RANK="1", **place) == (0, "", [])
    assert dry(RANK="0", **place)[1].startswith("model:")


def test_memory_is_compared_with_that_of_the_gpu(dry, monkeypatch):
    """The GPU stands for one of 80 GB; the formula is checked where it is."""
    class Card:
        total_memory = 80 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    assert any("the GPU here has 74.5 GiB" in line for line in dry()[2])
    too_much = ("model.max_seq_len=1000000", "data.seq_len=1000000", "train.micro_batch_size=8")
    said = refusal(dry(*too_much))
    assert "the GPU here has 74.5 GiB: the nearest that fits needs " in said
    keys = said.partition(": set ")[2].partition(" (")[0].split()
    assert keys, said
    assert dry(*too_much, *keys)[0] == 0, "what is advised fits"


def test_memory_is_compared_with_that_of_a_kind(dry):
    long = ("model.max_seq_len=1000000", "data.seq_len=1000000", "train.micro_batch_size=8", "--gpu")
    assert dry(*long, "b200")[0] == 0
    assert "a100-40 has 39.4 GiB: the nearest that fits needs" in refusal(dry(*long, "a100-40"))
    nothing = ("model.max_seq_len=100000000", "data.seq_len=100000000", "--gpu", "rtx4090")
    assert "nothing fits on as many: take more ranks" in refusal(dry(*nothing))
    assert "--gpu gtx: is not in the table: use one of a100-40" in refusal(dry("--gpu", "gtx"))


def test_a_run_takes_the_gpus_that_are_there(capsys):
    assert main(["--config", "quickstart", "--gpu", "h100"]) == 2
    assert "--gpu is of --dry-run: " in capsys.readouterr().err


@pytest.mark.parametrize(("error", "is_one"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("out of memory"), False),
])
def test_out_of_memory_is_a_line_that_names_what_needs_less(monkeypatch, capsys, error, is_one):
    assert is_out_of_memory(error) is is_one

    def fail(*_):
        raise error

    monkeypatch.setattr("hyena_dist.cli.pretrain._run", fail)
    assert main(["--config", "quickstart"]) == 1
    said = capsys.readouterr().err
    if is_one:
        assert said.count("\n") == 1
        for key in ("train.micro_batch_size", "train.activation_checkpointing=full", "parallel.context"):
            assert key in said


def test_a_real_allocation_that_fails_is_known():
    """What torch itself raises for more memory than there is."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value), caught.value
