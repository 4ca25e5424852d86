"""Which code computes the operators."""

from dataclasses import dataclass

from hyena_dist.config.sections.ranges import one_of

BACKENDS = ("auto", "torch", "triton", "cudnn", "flashfftconv")
"""The values of ops.backend; `ops/backends.py` chooses by them."""


@dataclass(frozen=True, kw_only=True)
class OpsSection:
    """Which code computes the operators; never changes what they mean."""

    backend: str = "auto"
    """Of the Hyena operator, of norms, GELU and filters. torch; triton: kernels of the extra `kernels`, on CUDA, of the
    operator with at most 8 taps, elsewhere torch, and the log says so (the transforms of
    parallel.context_method=distributed_fft are torch's); cudnn, flashfftconv: on one context rank the long convolution
    by that library where it is installed, the rest by torch (`ops/libraries.py`; never timed); auto: triton where it
    was measured and checked: on GPUs of capability 9.0 (H100, H200), the operator on one context rank at order 2
    without segments, at the lengths and in the dtypes of `ops/backends.py` and `ops/triton/plans.py`."""

    def __post_init__(self) -> None:
        one_of("ops", "backend", self.backend, BACKENDS)
