import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.costs.flops import parts, training_bytes, training_flops
from hyena_dist.costs.utilisation import Shares, Utilisation, copy_bandwidth

SECTION = ModelSection(num_layers=2, hidden_size=64, max_seq_len=512)


def utilisation(precision: str, **limits: float | None) -> Utilisation:
    return Utilisation(Config(model=SECTION, train=TrainSection(run_dir="r", precision=precision)), 4, **limits)


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_shares_of_four_devices(precision, itemsize):
    """Four devices that do one micro-batch of two in a second, of limits twice and five times as high."""
    work = training_flops(SECTION, 512, 2)
    moved = sum(training_bytes(part, itemsize) for part in parts(SECTION, 512, 2).values())
    shares = utilisation(precision, peak=2 * work, bandwidth=5 * moved).shares(
        seq_len=512, micro_batch_size=2, tokens_per_second=4 * 2 * 512)
    assert shares.mfu == pytest.approx(0.5)
    assert shares.bandwidth == pytest.approx(0.2)


def test_unknown_limits_are_null():
    assert utilisation("fp32", peak=None, bandwidth=None).shares(
        seq_len=512, micro_batch_size=1, tokens_per_second=1.0) == Shares(None, None)


def test_copy_bandwidth_is_that_of_a_memory(monkeypatch):
    monkeypatch.setattr("hyena_dist.costs.utilisation.COPY_BYTES", 2**22)
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13
