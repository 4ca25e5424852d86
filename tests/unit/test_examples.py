"""Every command that is printed as an example passes its own checks: in --help, README, docs and the batch script."""

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.cli import (
    build,
    convert,
    doctor,
    embed,
    evaluate,
    finetune,
    generate,
    main,
    needle,
    plan,
    predict,
    pretrain,
    scaling,
    score,
    show,
    species,
    suite,
    sweep,
    verify,
)

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "shards" / "sample"
EXAMPLE = re.compile(r"^(?:[ #$]|examples?:)*((?:[A-Z_]+=\S+ )*(?:(?:deepspeed|torchrun|srun|sbatch) -|"
                     r"hyena-dist |python3? (?:launchers|shards)/)[^`|]*)$")
TASKS_PER_NODE = 8  # of the batch script


def launcher(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"launcher_{name}", ROOT / "launchers" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = {"pretrain": pretrain, "finetune": finetune, "predict": predict, "suite": suite, "needle": needle,
            "species": species, "plan": plan, "evaluate": evaluate, "score": score, "generate": generate,
            "embed": embed, "convert": convert, "build": build, "verify": verify, "scaling": scaling, "doctor": doctor,
            "show": show, "sweep": sweep, "bench": launcher("bench"), "gpu_check": launcher("gpu_check"),
            "studies": launcher("studies"), "gue": launcher("gue"),
            "long_context": launcher("long_context")}


def help_of(command: Any) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command(["--help"])
    return said.getvalue()


def texts() -> Iterator[tuple[str, str]]:
    for name, module in COMMANDS.items():
        yield f"{name} --help", help_of(module.parse_args)
    yield "hyena-dist --help", help_of(main.main)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
                 *(ROOT / "launchers/slurm").glob("*.sbatch")):
        yield str(path.relative_to(ROOT)), path.read_text("utf-8")


def examples() -> list[tuple[str, str]]:
    """Where each is printed, and the command; lines that go on behind a backslash are one."""
    found = []
    for where, text in texts():
        for line in text.replace("\\\n", " ").splitlines():
            match = EXAMPLE.match(line)
            # Not the script's own lines, nor programs that the page itself shows.
            if match and '"$@"' not in line and " train.py" not in line:
                found.append((where, match[1]))
    return found


EXAMPLES = examples()


def ranks_of(words: list[str]) -> str | None:
    """How many the launcher would start; None: plain Python."""
    text = " ".join(words).replace("-", "_").replace("=", " ")
    if words[0] == "sbatch":
        return str(TASKS_PER_NODE * int((re.search(r"__nodes (\d+)", text) or [0, 1])[1]))
    found = re.search(r"__(?:num_gpus|nproc_per_node|ntasks) (\d+)", text)
    return found[1] if found and words[0] in ("deepspeed", "torchrun", "srun") else None


def arguments_of(words: list[str]) -> tuple[str, list[str]]:
    """The command, and what is given to it."""
    for place, word in enumerate(words):
        if word in ("hyena-dist", "hyena_dist.cli.main"):
            return words[place + 1], words[place + 2:]
        if found := re.fullmatch(r"(?:launchers|shards)(?:/slurm)?/(\w+)\.(?:py|sbatch)", word):
            of_launcher = found[1] in ("torchrun", "deepspeed")  # batch scripts named by what starts the ranks
            return "pretrain" if of_launcher else found[1], words[place + 1:]
    raise AssertionError(f"no command in {words}")


def write_genomes(arguments: list[str]) -> None:
    """Small FASTA files of the names that are given, with the contigs that are to be held out, and the BED file."""
    held_out = [arguments[place + 1].split(",") for place, word in enumerate(arguments) if word == "--val-contigs"]
    for argument in arguments[: next(place for place, word in enumerate(arguments) if word.startswith("--"))]:
        label, _, path = argument.split("::")[0].rpartition("=")
        names = ["chr1", *(name.removeprefix(f"{label}.") for name in sum(held_out, [])
                           if not label or name.startswith(f"{label}."))]
        draw = np.random.default_rng(list(path.encode()))
        for place, word in enumerate(arguments):
            if word == "--bed":
                Path(arguments[place + 1]).write_text("chr1 0 2000 train\nchr1 2000 3000 valid\n")
        if Path(path).exists():  # of the sample
            continue
        Path(path).write_text("".join(f">{name}\n{''.join(draw.choice(list('ACGT'), 3000))}\n" for name in names))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty directory with what a checkout has; no launcher's variables."""
    for name in ("configs", "launchers", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/sample").symlink_to(SAMPLE)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(command: str, monkeypatch) -> int:
    """The status of the checks of a printed command."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    if (ranks := ranks_of(words)) is not None:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    name, arguments = arguments_of(words)
    if name == "pretrain":
        return pretrain.main([*arguments, *["--dry-run"] * ("--dry-run" not in arguments)])
    if name == "build":
        write_genomes(arguments)
        return build.main([*arguments, "--dry-run"])
    if name == "sweep" and words[0] == "sbatch":
        arguments = ["run", *arguments]  # as the script does
    if name == "plan" and "--probe" not in arguments:
        return plan.main(arguments)
    if name == "sweep" and arguments[0] == "plan":
        return sweep.main(arguments)
    if name == "gpu_check" and "--wheels" in arguments:
        Path(arguments[arguments.index("--wheels") + 1]).mkdir(parents=True)
    COMMANDS[name].parse_args(arguments)  # the others have no --dry-run: what they want is there after a run only
    return 0


@pytest.mark.parametrize(("where", "command"), EXAMPLES, ids=[f"{at}: {said[:60]}" for at, said in EXAMPLES])
@pytest.mark.usefixtures("elsewhere")
def test_an_example_passes_its_own_checks(where, command, monkeypatch, capsys):
    assert run(command, monkeypatch) == 0, f"{where}: {command}: {capsys.readouterr().err}"
    assert "error" not in capsys.readouterr().err


def test_a_file_of_the_sample_is_named_where_it_lies():
    names = {path.name for path in SAMPLE.iterdir()}
    words = [(where, word) for where, said in EXAMPLES for word in shlex.split(said, comments=True)]
    paths = [(where, Path(word.rpartition("=")[2])) for where, word in words]
    of_sample = [(where, path) for where, path in paths if path.name in names or path.parts[:2] == ("shards", "sample")]
    assert "docs/mixtures.md" in {where for where, _ in of_sample}
    for page in (ROOT / "README.md", SAMPLE / "README.md", *(ROOT / "docs").rglob("*.md")):
        found = re.findall(r"shards/sample/[\w.*]+\b", page.read_text("utf-8"))
        of_sample += [(page.name, Path(path)) for path in found]
    assert not [f"{where}: {path}" for where, path in of_sample if not list(ROOT.glob(str(path)))]


def test_the_quickstart_takes_as_long_wherever_it_is_said():
    for name in ("README.md", "Makefile", "configs/quickstart.yaml"):
        said = re.findall(r"\w+ minutes on two CPU cores", (ROOT / name).read_text("utf-8"))
        assert said == ["four minutes on two CPU cores"], name


def test_examples_are_found():
    places = {where for where, _ in EXAMPLES}
    assert places >= {"README.md", "docs/training.md", "docs/shards.md", "docs/formats.md", "docs/parallelism.md",
                      "docs/planning.md", "launchers/slurm/pretrain.sbatch",
                      "launchers/slurm/sweep.sbatch", "docs/sweeps.md",
                      "hyena-dist --help", *(f"{name} --help" for name in COMMANDS)}


@pytest.mark.usefixtures("elsewhere")
def test_a_wrong_example_is_seen(monkeypatch, capsys):
    """The control: eight ranks of four windows each do not make a batch of eight."""
    assert run("deepspeed --num_gpus 8 launchers/pretrain.py --config configs/quickstart.yaml", monkeypatch) == 2
    assert "train.global_batch_size (8) is not a multiple" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("python launchers/evaluate.py", monkeypatch)
