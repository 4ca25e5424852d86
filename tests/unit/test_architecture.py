"""The layout holds: imports run one way, third-party frameworks enter by their doors, every module can be imported."""

import ast
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import hyena_dist

ROOT = Path(hyena_dist.__file__).parent
LAYERS = [{"config"}, {"ops", "parallel", "data"}, {"runtime"}, {"engine", "model"}, {"checkpoint", "costs"}, {"train"},
          {"tasks", "convert"}, {"cli", "api"}]
DOORS = {"deepspeed": ("engine/",), "webdataset": ("data/",), "tensorboard": ("train/board.py",),
         "torch.utils.tensorboard": (), "wandb": ("train/weights_and_biases.py",),
         "megatron": ("model/", "parallel/groups.py"), "triton": ("ops/",)}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


def layer(part: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if part in names)


def violations(path: Path, names: set[str]) -> list[str]:
    relative = path.relative_to(ROOT)
    part = relative.parts[0].removesuffix(".py")
    found = []
    for name in names:
        if name.startswith("hyena_dist."):
            other = name.split(".")[1]
            if other != part and layer(other) >= layer(part):
                found.append(f"{relative} imports {name}")
        for library, doors in DOORS.items():
            if (name == library or name.startswith(library + ".")) and not str(relative).startswith(doors):
                found.append(f"{relative} imports {name}; its doors are {doors}")
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != ROOT or p.name != "__init__.py"],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    assert violations(path, imports(path)) == []


def test_violations_are_seen():
    """The control: each kind of violation is found."""
    assert violations(ROOT / "ops" / "x.py", {"hyena_dist.model.model"})
    assert violations(ROOT / "ops" / "x.py", {"hyena_dist.data.stream"})
    assert violations(ROOT / "engine" / "x.py", {"hyena_dist.model.loss"})
    assert violations(ROOT / "train" / "x.py", {"deepspeed.ops"})
    assert violations(ROOT / "train" / "trainer.py", {"torch.utils.tensorboard"})


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(hyena_dist.__path__, "hyena_dist.")]
    assert len(names) > 30
    for name in names:
        if not name.startswith("hyena_dist.ops.triton.") or importlib.util.find_spec("triton"):  # of an extra
            importlib.import_module(name)


def test_importing_starts_no_process_group():
    import torch.distributed as dist
    assert not dist.is_initialized()


def test_files_and_functions_are_read_in_one_sitting():
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def named_files(text: str) -> list[list[str]]:
    """The Python files of this package that each line of a text names; NAME stands for any."""
    return [re.findall(r"`(?:hyena_dist/)?([a-z_]+(?:/[a-zA-Z_]+)+\.py)", line) for line in text.splitlines()]


def test_files_that_the_docs_send_a_reader_to_are_there():
    for document in ("CONTRIBUTING.md", "docs/architecture.md"):
        for names in named_files((ROOT.parent / document).read_text("utf-8")):
            for name in names:
                place = ROOT.parent if name.startswith(("tests/", "benchmarks/", "launchers/")) else ROOT
                assert (place / name).exists() or (name.endswith("/NAME.py") and (place / name).parent.is_dir()), name
    table = (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8").partition("| what | where |")[2]
    assert len(named_files(table)) > 10


def test_files_that_docs_name_are_found():
    """The control."""
    text = "see `hyena_dist/ops/x.py`, `train/NAME.py` and `y.py`\n`pip`"
    assert named_files(text) == [["ops/x.py", "train/NAME.py"], []]


def text_without_encoding(source: str) -> list[int]:
    """Lines of calls that open a file or a pipe as text, and leave its encoding to the machine's locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, keys = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        name, of_method = called.rpartition(".")[2], called not in ("open", "os.fdopen")
        mode = keys.get("mode", (node.args[1 - of_method:] or [ast.Constant("r")])[0])
        text = (name in ("read_text", "write_text")
                or (name in ("open", "fdopen") and called not in ("os.open", "tarfile.open")
                    and "b" not in str(getattr(mode, "value", "")))
                or (name in ("run", "Popen", "check_output") and "text" in keys))
        if text and "encoding" not in keys and not (name == "read_text" and node.args):
            found.append(node.lineno)
    return found


def test_text_is_utf_8_whatever_the_locale():
    places = [path for folder in ("hyena_dist", "launchers", "shards", "benchmarks")
              for path in (ROOT.parent / folder).rglob("*.py")]
    assert {str(path): lines for path in places if (lines := text_without_encoding(path.read_text("utf-8")))} == {}


def test_text_without_an_encoding_is_seen():
    """The control: each way to open text, and what is none."""
    left = ("open(p)\nopen(p, 'a+')\np.open()\np.open('r')\np.read_text()\np.write_text(s)\nos.fdopen(d, 'w')\n"
            "subprocess.run(c, text=True)\nopen(p, mode='w')")
    assert sorted(text_without_encoding(left)) == [*range(1, 10)]
    assert not text_without_encoding("open(p, 'rb')\np.open('wb')\nos.open(p, f)\np.read_text('utf-8')\n"
                                     "open(p, encoding='utf-8')\nsubprocess.run(c)\ntarfile.open(p)")
