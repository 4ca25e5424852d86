"""What tests of two machines share."""

import sys
from collections.abc import Iterator

import pytest

from tests.e2e.test_pretrain import losses, run
from tests.nodes.jobs import ARGUMENTS
from tests.nodes.machines import Machine, two_machines


@pytest.fixture(scope="module")
def alone(request, shards, tmp_path_factory) -> dict[int, float]:
    """The losses of one process that nobody disturbs, over the module's STEPS."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = run([sys.executable, "launchers/pretrain.py", "--config", "configs/quickstart.yaml", *ARGUMENTS,
                  f"data.shards={shards}", f"train.run_dir={run_dir}", f"train.steps={request.module.STEPS}"])
    assert result.returncode == 0, result.stderr
    return losses(run_dir)


@pytest.fixture
def machines(tmp_path) -> Iterator[list[Machine]]:
    with two_machines(tmp_path) as made:
        yield made
