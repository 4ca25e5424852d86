"""Triton's kernels over two context ranks that share the GPU, against float64."""

from benchmarks.gpu.task import Task
from benchmarks.gpu.tests import one_file


def run(task: Task) -> None:
    if task.tiny:
        task.note("the kernels need a GPU; on a CPU the interpreter runs them, in tests/triton_ranks.py")
        return
    one_file(task, "tests/gpu/test_triton_ranks.py")
