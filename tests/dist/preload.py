"""What every rank of a distributed test imports: the fork server imports it once, ranks are forked from there."""

import sys

import deepspeed  # noqa: F401
import megatron.core.tensor_parallel  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

import hyena_dist.train.session  # noqa: F401

# As without the extra `plots`: a report takes as long as a dozen steps of these models, and is looked at elsewhere.
sys.modules["matplotlib"] = None  # type: ignore[assignment]
