"""The last base of a needle's model hears of the first three context ranks by the exchange between ranks alone."""

from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks.needle import RANKS, severed
from hyena_dist.config.load import load_config
from hyena_dist.config.presets import find
from hyena_dist.model.model import build_model
from hyena_dist.model.pooled import PooledModel
from hyena_dist.parallel.groups import init_groups
from hyena_dist.parallel.tokens import slice_tokens
from tests.dist.harness import run_distributed


def _heard() -> dict[bool, list[bool]]:
    """By whether the exchange is cut: for a base in each rank's slice, whether the answer depends on it."""
    config = load_config(find("finetune/needle"), ["model.max_seq_len=256", f"parallel.context={RANKS}"])
    groups = init_groups(context=RANKS)
    model = PooledModel(build_model(config, groups), outputs=2, pooling="last", seed=0).double()
    ids = torch.randint(7, 263, (1, 256), generator=torch.Generator().manual_seed(0))

    def answer(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(slice_tokens(ids, groups.context, multiple=model.token_multiple, fill=4), torch.tensor([256]))

    found: dict[bool, list[bool]] = {}
    for cut in (False, True):
        with severed() if cut else nullcontext():
            whole, found[cut] = answer(ids), []
            for place in range(32, 256, 64):
                other = ids.clone()
                other[0, place] = 7 + (other[0, place] - 6) % 256
                found[cut].append(not torch.equal(answer(other), whole))
    return found


def test_the_last_base_hears_of_the_first_three_ranks_by_the_exchange_alone() -> None:
    for found in run_distributed(_heard, RANKS):
        assert found == {False: [True] * 4, True: [False] * 3 + [True]}
