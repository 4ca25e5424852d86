"""The devices of a test that runs on a CPU and on a GPU: the first tries the test itself, the second is what it asks.

`pytest -m gpu` takes the GPU, every other call hides it (tests/conftest.py).
"""

import pytest
import torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA: pytest -m gpu, on a GPU"))
"""Marks of a test that needs one."""
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=GPU)]
SLOW_DEVICES = [pytest.param(CPU, id="cpu", marks=pytest.mark.slow), pytest.param(CUDA, id="cuda", marks=GPU)]
"""Of a test that takes long on a CPU, where others try most of it."""
