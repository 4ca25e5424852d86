"""Steps of other sizes: small ones are bound by launches, long ones by memory."""

from functools import partial

from benchmarks.gpu.measure import Size, forget_peak
from benchmarks.gpu.million import one
from benchmarks.gpu.task import Task

SIZES = (Size(2, 128, 1024, 4), Size(4, 256, 32768), Size(2, 128, 1024, 256), Size(8, 256, 131072),
         Size(4, 256, 32768, 8))
TINY = (Size(1, 16, 128, 2),)


def run(task: Task) -> None:
    for size in TINY if task.tiny else SIZES:
        task.attempt(str(size), partial(one, task, size, profile=True))
        forget_peak()
