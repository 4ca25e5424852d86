"""The seconds of a step are those of its device, not those of launching its work."""

import time

import pytest
import torch

from hyena_dist.train.laps import Laps
from tests.gpu.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
def test_laps_are_the_devices_time(device: torch.device) -> None:
    size, products = (8192, 20) if device.type == "cuda" else (512, 20)
    x = torch.zeros(size, size, device=device)
    for _ in range(2):  # the first call loads the kernel
        x = x @ x
    wait(device)
    started = time.monotonic()
    laps = Laps(device)
    for _ in range(products):
        x = x @ x
    laps.mark()
    launched = time.monotonic() - started
    laps.mark()
    wait(device)
    whole = time.monotonic() - started
    print(f"device {laps.seconds(0, 1):.4f} s, launching {launched:.4f} s, both {whole:.4f} s")
    assert 0 <= laps.seconds(1, 2) < laps.seconds(0, 1) / 10
    assert laps.seconds(0, 1) == pytest.approx(whole, rel=0.25)
    if device.type == "cuda":
        assert launched < whole / 4, "the control: the host's clock tells something else"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
