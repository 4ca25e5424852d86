"""How one model and one sequence are split over ranks."""

from dataclasses import dataclass

from hyena_dist.config.sections.ranges import one_of, positive


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How one sequence and one model are split; what is left of the ranks is data parallel."""

    tensor: int = 1
    """Tensor-parallel ranks: channels and vocabulary are split."""
    context: int = 1
    """Context-parallel ranks: tokens are split."""
    sequence: bool = False
    """Megatron's sequence parallelism: norms and residual stream split over the tensor ranks."""
    context_method: str = "auto"
    """How the long convolution crosses context ranks: auto, all_to_all or distributed_fft."""
    overlap_groups: int = 1
    """Channel groups that pipeline the exchange under the transform."""

    def __post_init__(self) -> None:
        positive("parallel", tensor=self.tensor, context=self.context, overlap_groups=self.overlap_groups)
        one_of("parallel", "context_method", self.context_method, ("auto", "all_to_all", "distributed_fft"))
