"""Presets are found by name, and so are the commands, wherever the project is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hyena_dist.cli.main import COMMANDS, main
from hyena_dist.cli.pretrain import main as pretrain
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.load import load_config
from hyena_dist.config.presets import DIRECTORY, find, names
from hyena_dist.costs.engines import parameters

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # layers, channels, length, l_max and weights of each published model
    "tiny-1k": (2, 128, 1024, 1026, 436_096), "tiny-1k-d256": (2, 256, 1024, 1026, 1_641_088),
    "tiny-16k-d128": (2, 128, 16384, 16386, 436_096), "small-32k": (4, 256, 32768, 32770, 3_277_568),
    "medium-160k": (8, 256, 160000, 160002, 6_550_528), "medium-450k": (8, 256, 450000, 450002, 6_550_528),
    "large-1m": (8, 256, 1000000, 1000002, 6_550_528)}


def test_presets_are_the_files_under_configs() -> None:
    configs = ROOT / "configs"
    files = sorted(str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml")
                   if path.parent.name not in ("sweeps", "studies"))  # of many runs each
    assert names() == files
    assert {f"published/{name}" for name in PUBLISHED} < set(files)


@pytest.mark.parametrize(("name", "sizes"), PUBLISHED.items())
def test_every_published_model_has_a_configuration_that_passes(name: str, sizes: tuple[int, ...], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture) -> None:
    config = load_config(find(f"published/{name}"))
    model = config.model
    assert (model.num_layers, model.hidden_size, config.data.seq_len, model.max_seq_len, parameters(model)) == sizes
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert pretrain(["--config", f"published/{name}", "--dry-run"]) == 0
    assert "error" not in capsys.readouterr().err


def test_a_file_wins_over_a_preset_and_what_is_neither_is_one_line(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("quickstart") == DIRECTORY / "quickstart.yaml"
    Path("quickstart").mkdir()
    assert find("quickstart") == DIRECTORY / "quickstart.yaml", "a directory is no configuration"
    Path("quickstart").rmdir()
    Path("quickstart").touch()
    assert find("quickstart") == Path("quickstart")
    assert find("mine.yaml") == Path("mine.yaml"), "whose reader says that it is not there"
    with pytest.raises(ConfigError, match=r"--config nothing: there is no such file, and no preset .*: use one of .*"):
        find("nothing")


def test_the_command_hands_on_to_each_of_its_own(monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["hyena-dist"])
    assert main([]) == main(["--help"]) == 0
    assert main(["train"]) == 2
    assert f"there is no command 'train': use one of {', '.join(COMMANDS)}" in capsys.readouterr().err
    for name in COMMANDS[1:]:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"usage: hyena-dist {name}" in capsys.readouterr().out
    assert main(["verify", "nowhere"]) == 2, "the status is the command's"


def test_deepspeeds_own_argument_may_come_first() -> None:
    """`deepspeed --module hyena_dist.cli.main pretrain ...` puts it there."""
    command = [sys.executable, "-m", "hyena_dist.cli.main", "--local_rank=0", "pretrain", "--config", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no preset of that name" in done.stderr


@pytest.mark.slow
def test_a_wheel_holds_presets_and_command_and_works_elsewhere(tmp_path: Path) -> None:
    """Built without a network from a copy, installed beside the libraries that are here."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("hyena_dist", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source],
                   check=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"hyena_dist/presets/{name}.yaml" for name in names()} <= set(held)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel],
                   check=True, timeout=300)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "WORLD_SIZE": "2"}
    environment.pop("RANK", None)
    command = [sys.executable, tmp_path / "site" / "bin" / "hyena-dist", "pretrain", "--config", "quickstart"]
    done = subprocess.run([*command, "--dry-run"], cwd=elsewhere, env=environment, capture_output=True, text=True,
                          check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 128" in done.stdout
    where = subprocess.run([sys.executable, "-c", "import hyena_dist; print(hyena_dist.__file__)"], cwd=elsewhere,
                           env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert where.stdout.startswith(str(tmp_path / "site")), "not the checkout"
