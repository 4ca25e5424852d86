"""The windows of a run over its stages: cut anywhere and gone on with, they are those of one run."""

import multiprocessing
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import TrainStream
from hyena_dist.train.curriculum import Curriculum

STAGES = [{"seq_len": 64, "steps": 3}, {"seq_len": 100, "tokens": 1700}]
LAST = [64, 64, 64, 100, 100, 100, 256, 256]
"""Lengths by step: 1700 tokens are 2.1 steps of 8 windows of 100."""


@pytest.fixture(scope="module")
def manifest(shards):
    return Manifest.load(shards)


def config(num_workers=0, micro=2, **train):
    values = {"seq_len_warmup": STAGES, "steps": len(LAST), "global_batch_size": 8, "micro_batch_size": micro} | train
    return Config(data=DataSection(shards="s", seq_len=256, rc_augment=True, num_workers=num_workers, seed=3),
                  train=TrainSection(run_dir="r", **values))


def run(manifest, run_config, steps, ranks=1, saved=None):
    """The windows of each step, over all ranks and by their number in the order, and the last rank's state."""
    rows = [{} for _ in range(steps)]
    for rank in range(ranks):
        with closing(Curriculum(manifest, run_config, dp_rank=rank, dp_size=ranks)) as curriculum:
            if saved is not None:
                curriculum.load_state_dict(saved)
            for step in rows:
                stage, batches = curriculum.take()
                for batch in batches:
                    assert batch.ids.shape == (stage.micro_batch_size, stage.seq_len + 1)
                    step |= {(stage.index, number): row.tolist()
                             for number, row in zip(batch.windows.tolist(), batch.ids, strict=True)}
                assert len(batches) * stage.micro_batch_size * ranks == stage.global_batch_size
    return rows, curriculum.state_dict()


@pytest.fixture(scope="module")
def whole(manifest):
    return run(manifest, config(), len(LAST))


def test_each_step_is_of_its_stage(whole):
    steps, _ = whole
    assert [{len(row) - 1 for row in step.values()} for step in steps] == [{length} for length in LAST]
    assert [len(step) for step in steps] == [8] * len(LAST)
    numbers = [[number for _, number in step] for step in steps]
    assert numbers[3] == list(range(8)), "a stage starts its own order"


@pytest.mark.parametrize("cut", range(len(LAST) + 1))
def test_cut_and_resumed_is_the_whole(manifest, whole, cut):
    """In every stage and at its ends; the second part with other ranks, micro-batches and workers."""
    first, saved = run(manifest, config(num_workers=int(cut == 4)), cut, ranks=1 + cut % 2)
    second, last = run(manifest, config(num_workers=int(cut == 1), micro=1), len(LAST) - cut, 4 - 3 * (cut % 2), saved)
    assert (first + second, last) == whole
    stage = 0 if cut < 3 else 1 if cut < 6 else 2
    assert (saved["step"], saved["stage"]) == (cut, stage), "after a stage's last step comes the next stage's first"


def test_control_another_position_gives_other_windows(manifest, whole):
    _, saved = run(manifest, config(), 4)
    resumed, _ = run(manifest, config(), 1, saved={**saved, "index": saved["index"] + 8, "passed": 1})
    assert resumed[0] == whole[0][5] != whole[0][4]


def numbers(curriculum):
    stage, batches = curriculum.take()
    return [(stage.index, number) for batch in batches for number in batch.windows.tolist()]


def test_windows_that_were_passed_over_never_come_back(manifest):
    """Back to step 1 from a step of the next stage, and back again: each window comes once but those of the way back,
    and a resume knows what was passed over."""
    with closing(Curriculum(manifest, config())) as curriculum:
        numbers(curriculum)
        saved = curriculum.state_dict()
        lost = [numbers(curriculum) for _ in range(4)]  # steps 1 to 4, the last two in stage 1
        curriculum.load_state_dict(saved)
        curriculum.skip(steps=4)
        assert curriculum.step == 1
        again = [numbers(curriculum) for _ in range(3)]
        passed = curriculum.passed
        curriculum.load_state_dict(saved)
        curriculum.skip(steps=passed + 3)
        again += [numbers(curriculum) for _ in range(2)]
        resumed = Curriculum(manifest, config())
        resumed.load_state_dict(curriculum.state_dict())
        rest = [numbers(curriculum) for _ in range(len(LAST) - 3)]
        assert rest == [numbers(resumed) for _ in range(len(LAST) - 3)]
    assert not {w for step in lost for w in step} & {w for step in (*again, *rest) for w in step}
    assert again[0][0] == (0, 5 * 8), "on from the lost step's windows, in this stage's order"
    assert len({w for step in again for w in step}) == 5 * 8


def test_without_a_warm_up_the_order_is_that_of_one_stream(manifest):
    steps, _ = run(manifest, config(seq_len_warmup="none"), 3)
    stream = TrainStream(manifest, seq_len=256, seed=3, rc_augment=True)
    batches = stream.batches(stream.start(), micro_batch_size=8, global_batch_size=8)
    assert [list(step.values()) for step in steps] == [next(batches).ids.tolist() for _ in range(3)]


def test_workers_end_with_their_stage(manifest):
    before = set(multiprocessing.active_children())
    with closing(Curriculum(manifest, config(num_workers=2))) as curriculum:
        living = []
        for _ in LAST:
            curriculum.take()
            living.append(len(set(multiprocessing.active_children()) - before))
    assert living == [2, 2, 0, 2, 2, 0, 2, 2]
    assert set(multiprocessing.active_children()) == before
    curriculum.close()


def test_batches_outlive_their_workers(manifest, whole):
    with closing(Curriculum(manifest, config(num_workers=1))) as curriculum:
        taken = [curriculum.take() for _ in range(4)]
    assert torch.cat([batch.ids for batch in taken[2][1]]).tolist() == list(whole[0][2].values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"step": None}, "has no step"),
    ({"step": 5}, "saved position is not that of step 5"),
    ({"passed": 1}, "saved position is not that of step 4"),
    ({"step": 2}, "saved seq_len is 100, this run's is 64"),
    ({"stage": 2}, "saved stage is 2, this run's is 1"),
    ({"seed": 4}, "saved seed is 4"),
    ({"seq_len": 64}, "saved seq_len is 64, this run's is 100"),
])
def test_refuses_states_of_other_runs(manifest, changes, message):
    _, saved = run(manifest, config(), 4)
    with pytest.raises(DataError, match=message):
        Curriculum(manifest, config()).load_state_dict({**saved, **changes})


def test_refuses_other_stages(manifest):
    _, saved = run(manifest, config(), 4)
    other = replace(config(), train=replace(config().train, seq_len_warmup=[{"seq_len": 64, "steps": 4}]))
    with pytest.raises(DataError, match="saved seq_len is 100, this run's is 256"):
        Curriculum(manifest, other).load_state_dict(saved)
    with pytest.raises(DataError, match="not that of step 4 of this run's stages and batches"):
        Curriculum(manifest, config(global_batch_size=16)).load_state_dict(saved)
