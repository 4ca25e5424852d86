"""The kernels around the operator in Triton's interpreter, values and every gradient against float64."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs the extra `kernels`")

# 2-norms of errors, the interpreter's cutting off of bfloat16 among them (`test_triton`). A wrong row makes an error
# above 0.1.
FLOAT32, FLOAT16, BFLOAT16 = 2e-6, 1.5e-3, 5e-3
FAST = {
    "norm 96": FLOAT32, "norm 128, three rows": FLOAT32, "norm 256 bf16": BFLOAT16, "norm 256, half": FLOAT16,
    "norm 768": FLOAT32, "norm 7, one token": FLOAT32, "norm 1100": FLOAT32,
    "gelu": FLOAT32, "gelu, large": FLOAT32, "gelu bf16": BFLOAT16, "gelu fp16": FLOAT16,
    "mlp": FLOAT32, "linear": FLOAT32, "to channels": FLOAT32, "to channels, one row": FLOAT32, "layer norm": FLOAT32,
}
FAST |= {"filter": 1e-5, "filter of width 16": 1e-5, "filter of width 96": 1e-5, "filter of one layer": 1e-5,
         "filter of frequency 10": 3.0, "declared": 1e-3}
CONTROLS = {"filter, control": ("0", 0.1), "norm, control": ("y", 0.1), "gelu, control": ("y", 1e-4)}
"""(what must be wrong, by how much at least)"""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """All in one process of the interpreter."""
    done = subprocess.run([sys.executable, "-m", "tests.triton_around", *FAST, *CONTROLS], capture_output=True,
                          text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=590)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients(found, name):
    print(name, found[name], "allowed", FAST[name], "wrong rows", 0.1)
    assert max(found[name].values()) < FAST[name]


@pytest.mark.parametrize("name", CONTROLS)
def test_what_is_wrong_is_seen(found, name):
    what, least = CONTROLS[name]
    assert found[name][what] > least
