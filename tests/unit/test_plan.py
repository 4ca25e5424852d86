"""The planner: what it lays out is legal, adds up and fits; what it writes passes a dry run; mistakes are refused."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hyena_dist.cli import plan
from hyena_dist.cli.pretrain import main as pretrain
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.load import read_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.costs.devices import GPUS, find_gpu
from hyena_dist.costs.engines import Layout
from hyena_dist.costs.plan import (
    LENGTH_STEP,
    Machines,
    Plan,
    at_length,
    candidates,
    fastest,
    fewest_gpus,
    longest,
    nearest,
)
from hyena_dist.costs.seconds import compute_seconds, gpu_rates, uses_kernels
from hyena_dist.costs.traffic import links, step_traffic
from hyena_dist.model.kinds import check, is_legal

MILLION = 2**20


def config(layers: int = 8, width: int = 256, length: int = MILLION, batch: int = 8, **train: object) -> Config:
    return Config(model=ModelSection(num_layers=layers, hidden_size=width, max_seq_len=length, embed_dropout=0.0),
                  data=DataSection(shards="unused", seq_len=length),
                  train=TrainSection(**{"run_dir": "unused", "precision": "bf16", "global_batch_size": batch, **train}))


def machines(gpu: str = "h100", gpus: int = 8, per_node: int = 8) -> Machines:
    return Machines(GPUS[gpu], gpus, per_node)


def test_every_candidate_is_legal_and_all_kinds_are_there() -> None:
    found = list(candidates(config(), machines()))
    for each in found[::37]:
        check(each.config, world_size=8)
    parallels = {(each.config.parallel.tensor, each.config.parallel.context) for each in found}
    assert parallels == {(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if t * p <= 8}
    assert {each.config.parallel.context_method for each in found} == {"auto", "all_to_all", "distributed_fft"}
    assert {each.config.train.activation_checkpointing for each in found} == {"none", "selective", "block", "full"}
    assert {(each.config.engine.name, each.config.engine.zero_stage) for each in found} >= {
        *(("deepspeed", stage) for stage in range(4)), ("fsdp", 1)}
    assert len({each.config.train.micro_batch_size for each in found}) == 4
    odd = replace(config(), model=replace(config().model, hidden_size=250))
    assert {each.config.parallel.tensor for each in candidates(odd, machines())} == {1, 2}
    assert not is_legal(replace(odd, parallel=ParallelSection(tensor=4)), world_size=8)


def test_bytes_add_up_and_what_needs_less_has_less() -> None:
    whole = Plan(config(batch=1), machines(gpus=1))
    assert sum(whole.categories.values()) == whole.bytes
    assert whole.bytes > whole.memory.total
    tensors = sum(size for name, size in whole.categories.items() if name not in ("allocator's gaps", "CUDA context",
                                                                                 "NCCL"))
    assert tensors == pytest.approx(whole.memory.total)
    assert whole.memory.total == pytest.approx(54.93 * 2**30, rel=0.1), "as an H100 measured"
    for section, less in (("train", {"activation_checkpointing": "selective"}),
                          ("train", {"activation_checkpointing": "full"}), ("parallel", {"tensor": 2}),
                          ("parallel", {"context": 2})):
        smaller = replace(config(batch=2), **{section: replace(getattr(config(batch=2), section), **less)})
        assert Plan(smaller, machines(gpus=2)).bytes < 0.75 * whole.bytes, less
    late = Plan(config(layers=2, width=2048, length=1024, batch=1), machines(gpus=1))
    assert late.memory.moment == "update"
    assert late.categories["saved activations"] == 0 < late.categories["buckets"]


def test_links_inside_and_between_nodes() -> None:
    spread = replace(config(), parallel=ParallelSection(context=8))
    traffic = step_traffic(spread, 16)
    inside = links(traffic, spread, 16, 8)
    exchanged = traffic["context", "all_to_all"]
    assert inside["inside"] == exchanged + traffic["context", "halo"]
    assert sum(inside.values()) == sum(traffic.values())
    across = links(traffic, spread, 16, 4)
    assert across["between"] == pytest.approx(inside["between"] + traffic["context", "halo"] + exchanged * 4 / 7)
    assert links(traffic, spread, 16, 16)["between"] == 0


@pytest.mark.parametrize(("layers", "width", "length", "batch", "milliseconds"), [
    (2, 128, 1024, 4, 16.8), (4, 256, 32768, 1, 34.6), (8, 256, 16384, 1, 50.7), (8, 256, 65536, 1, 64.5),
    (8, 256, 131072, 1, 101.1), (4, 256, 131072, 1, 51.8), (8, 256, MILLION, 1, 631.9)])
def test_seconds_are_those_that_an_h100_measured(layers: int, width: int, length: int, batch: int,
                                                 milliseconds: float) -> None:
    """On 2026-11-26, with Triton's kernels (`benchmarks/results`)."""
    chosen = config(layers, width, length, batch, micro_batch_size=batch)
    found = compute_seconds(chosen, Layout.of(chosen, 1), gpu_rates(GPUS["h100"], "bf16", kernels=True))
    assert 1e3 * sum(found.values()) == pytest.approx(milliseconds, rel=0.15)


@pytest.mark.parametrize(("length", "milliseconds"), [(16384, 46.3), (65536, 180.8), (131072, 650.5)])
def test_seconds_of_attention_are_those_that_an_h100_measured(length: int, milliseconds: float) -> None:
    """On the same day. A context rank has a share of the heads, and takes as long as a tensor rank."""
    chosen = config(length=length, batch=1, micro_batch_size=1)
    chosen = replace(chosen, model=replace(chosen.model, layer_pattern="A", num_attention_heads=8))
    rates = gpu_rates(GPUS["h100"], "bf16", kernels=uses_kernels(chosen, GPUS["h100"]))
    assert 1e3 * sum(compute_seconds(chosen, Layout.of(chosen, 1), rates).values()) == pytest.approx(
        milliseconds, rel=0.16)
    over_context, over_tensor = (replace(chosen, parallel=split) for split in
                                 (ParallelSection(context=8), ParallelSection(tensor=8)))
    assert machines().rates_of(over_context) == machines().rates_of(over_tensor)


def test_the_fastest_fit_and_come_first() -> None:
    ranked = fastest(candidates(config(), machines("a100-40")))
    assert ranked
    assert all(each.bytes <= GPUS["a100-40"].memory for each in ranked)
    assert ranked[0].seconds <= 1.01 * min(each.seconds for each in ranked)
    assert not fastest(candidates(config(layers=32, width=512, batch=1), machines("l4", 1)))


def test_the_longest_length_is_the_last_that_fits() -> None:
    length, found = longest(config(), machines("rtx4090", 2))
    assert found.fits
    longer = replace(found.config, data=replace(found.config.data, seq_len=length + 1024),
                     model=replace(found.config.model, max_seq_len=length + 1024))
    assert not Plan(longer, found.machines).fits
    more, _ = longest(config(), machines("rtx4090", 4))
    assert more > 1.8 * length


def test_the_fewest_gpus_and_the_nearest_that_fits() -> None:
    few = fewest_gpus(config(), machines("l4", 8))
    assert few is not None
    assert not fastest(candidates(config(), machines("l4", few.machines.gpus // 2))) or few.machines.gpus == 1
    large = config(micro_batch_size=8, batch=8)
    assert not Plan(large, machines(gpus=1)).fits
    close = nearest(large, machines(gpus=1))
    assert close is not None
    assert close.fits
    assert (close.config.engine, close.config.parallel) == (large.engine, large.parallel)


def run(*arguments: str) -> int:
    return plan.main(["--size", "4x128", "--length", "65536", "--gpus", "4", "--gpu", "h100", *arguments])


def test_what_is_written_is_taken_by_a_dry_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--out", "planned.yaml", "--nodes", "2", "train.steps=7000", "--global-batch", "16") == 0
    said = capsys.readouterr()
    for part in ("legal layouts on 4 x h100 (2 a node", "ESTIMATED", "EXACT", "longest length on 4 x h100: ",
                 "largest micro-batch that fits", "recomputation: ", "fewest GPUs: "):
        assert part in said.out, part
    assert "MEASURED" not in said.out
    planned = read_config("planned.yaml")
    assert (planned.train.steps, planned.train.global_batch_size, planned.data.seq_len) == (7000, 16, 65536)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert pretrain(["--config", "planned.yaml", "--dry-run", "--gpu", "h100"]) == 0
    capsys.readouterr()
    assert run("--out", "planned.yaml") == 2, "nothing is overwritten"
    assert "--out planned.yaml: is there already: give another name" in capsys.readouterr().err
    assert run("--out", "planned.yaml/below") == 1
    assert "planned.yaml/below: could not be written (" in capsys.readouterr().err
    assert run("--out", "new/below/planned.yaml") == 0


def test_json_has_what_the_tables_have(capsys) -> None:
    assert run("--json", "--top", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 3
    first = found["plans"][0]
    assert sum(first["bytes"].values()) == pytest.approx(first["bytes_of_a_rank"], rel=1e-6)
    assert sum(first["seconds"].values()) == pytest.approx(first["seconds_of_a_step"])
    assert sum(first["sent"].values()) == sum(first["links"].values())
    assert set(first["sources"].values()) == {"ESTIMATED", "EXACT"}


def test_a_file_has_the_whole_table(capsys) -> None:
    assert plan.main(["--size", "8x256", "--length", str(MILLION), "--gpus", "3", "--gpu", "h200"]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert "│ 30 min 20 s │" in said, "the longest cell that a column of times has"


def test_a_picture_has_the_bytes_of_every_length(tmp_path, capsys) -> None:
    from hyena_dist.cli.plan_picture import bytes_by_length, lengths_around
    length, path = 3 * 5 * 7 * 11 * 13, tmp_path / "plan.png"
    whole = Plan(config(length=length, batch=1), machines(gpus=1))
    found = bytes_by_length(whole, lengths_around(length, 0))
    assert max(found) == 2 * length
    assert found[length] == whole.categories
    totals = [sum(of.values()) for of in found.values()]
    assert all(after > 0.97 * before for before, after in zip(totals, totals[1:], strict=False)), "but for chunks"
    assert totals[-1] > 1.5 * totals[len(totals) // 2]
    assert run("--picture", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for name, message in (("plan.txt", "let its name end in .png"), ("no/plan.png", "there is no directory")):
        assert run("--picture", str(tmp_path / name)) == 2
        shown, error = capsys.readouterr()
        assert message in error
        assert shown == ""


def test_the_page_has_the_numbers_that_its_first_command_prints(capsys) -> None:
    page = (Path(__file__).parents[2] / "docs/planning.md").read_text("utf-8")
    command = next(line for line in page.splitlines() if line.startswith("    python launchers/plan.py"))
    assert plan.main(shlex.split(command)[2:]) == 0
    said = capsys.readouterr().out
    printed = {tuple(cell.strip() for cell in line.strip("│").split("│")) for line in said.splitlines() if "│" in line}
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in page.splitlines()
            if line.startswith("| ") and "GiB" in line]
    assert len(rows) == 5
    assert set(rows) <= printed
    answered = page.split("    longest length", 1)[1].split("\n\n", 1)[0]
    for sentence in f"    longest length{answered}".splitlines():
        assert sentence.strip().removesuffix(" ...") in said
    legal, fit = re.search(r"\(([0-9,]+) layouts are legal, ([0-9,]+) fit\)", page).groups()
    assert f"{legal} legal layouts" in said
    assert f" {fit} fit;" in said


@pytest.mark.parametrize(("layers", "width", "length"), [(2, 64, 1024), (8, 256, MILLION), (8, 256, 8 * MILLION)])
def test_a_picture_shows_where_the_memory_ends(tmp_path, monkeypatch, layers: int, width: int, length: int) -> None:
    from matplotlib.figure import Figure

    from hyena_dist.cli.plan_picture import draw_bytes
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), path.touch()))
    whole = Plan(config(layers, width, length, batch=1), machines(gpus=1))
    draw_bytes(whole, tmp_path / "plan.png")
    [axes], memory = drawn[0].axes, whole.machines.gpu.memory / 2**30
    lines = {line.get_label(): line for line in axes.lines}
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert bottom < lines["memory of h100"].get_ydata()[0] == memory < top
    [longest] = [line.get_xdata()[0] for label, line in lines.items() if label.startswith("longest that fits")]
    assert left < longest < right
    assert left < length < right
    assert (longest < length) == (not whole.fits)
    assert Plan(at_length(whole.config, longest), whole.machines).fits
    assert not Plan(at_length(whole.config, longest + LENGTH_STEP), whole.machines).fits


def test_nothing_that_fits_is_said(capsys) -> None:
    assert plan.main(["--size", "8x256", "--length", "200000000", "--gpu", "l4", "--out", "no.yaml"]) == 1
    said = capsys.readouterr()
    assert "nothing fits 22.0 GiB: the least is " in said.out
    assert "written" not in said.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpu", "h100"], "give either --config YAML or --size"),
    (["--size", "8x256", "--config", "quickstart"], "give either --config YAML or --size"),
    (["--size", "8"], "--size 8: must be LAYERSxWIDTH"), (["--size", "0x8"], "--size 0x8: model.num_layers"),
    (["--size", "8x256", "--gpu", "gtx"], "--gpu gtx: is not in the table: use one of a100-40"),
    (["--size", "8x256"], "--gpu is missing, and this machine has none: use one of a100-40"),
    (["--size", "8x256", "--gpus", "0"], "--gpus 0: must be from 1 to "),
    (["--size", "8x256", "--gpus", "100000"], "--gpus 100000: must be from 1 to 16,384"),
    (["--size", "8x256", "--gpu", "h100", "--length", str(2**40)], f"--length {2**40}: must be from 1 to "),
    (["--size", "8x256", "--gpu", "h100", "parallel.tensor=2"], "'parallel.tensor=2': this is what a plan chooses"),
    (["--size", "8x256", "--gpus", "9", "--nodes", "2"], "--gpus 9: is not a multiple of --nodes 2"),
    (["--size", "8x256", "--gpu", "h100", "model.widht=3"], "widht"),
    (["--size", "8x256", "--gpu", "h100", "--length", "1"], "optim.warmup"),
    (["--config", "nowhere.yaml", "--gpu", "h100"], "nowhere.yaml"),
])
def test_mistakes_are_a_line(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if arguments[-1] == "1":  # legal lengths, a schedule that is not
        arguments = [*arguments, "train.steps=10", "optim.warmup_steps=10"]
    assert plan.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_a_probe_says_what_it_measured(capsys, monkeypatch) -> None:
    monkeypatch.setattr("hyena_dist.costs.probe.SECONDS", 0.02)
    assert plan.main(["--size", "2x32", "--length", "1024", "--probe", "model.embed_dropout=0.0"]) == 0
    said = capsys.readouterr().out
    assert "1 x cpu" in said or "1 x " in said
    assert "MEASURED" in said
    monkeypatch.setattr("hyena_dist.costs.probe._send_rate", lambda: 1e9)
    memory = []
    for ranks in ("1", "2"):
        arguments = ["--size", "2x32", "--length", "1024", "--probe", "--gpus", ranks, "--nodes", "1", "--json"]
        assert plan.main(arguments) == 0
        found = json.loads(capsys.readouterr().out)
        memory.append(int(found["answers"][0].partition(": ")[2].partition(" tokens")[0].replace(",", "")))
        assert found["plans"][0]["sources"]["product"] == "MEASURED"
    assert memory[1] < 1.2 * memory[0], "two ranks share the memory of this machine"
    with pytest.raises(ConfigError, match="--gpu x: is not in the table"):
        find_gpu("x")


@pytest.mark.slow
def test_seconds_are_those_of_this_cpu_after_a_probe() -> None:
    from benchmarks.planning import run as measure
    rows = measure()
    for row in rows:
        print(f"{row.side}: {row.seconds:.3f} s, planned {row.planned:.3f} s")
    assert len(rows) == 6
    assert all(0.7 < row.ratio < 1.3 for row in rows)
