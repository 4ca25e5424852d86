"""Low-rank adapters (LoRA, Hu et al. 2021): a product whose weight W is frozen uses W + (alpha / rank) B A, and only
A and B are learnt. B begins with zeros, so that training begins at the model as it was.

The sum is made before the product and not beside it: it costs rank additions for each element of W once in a pass,
which for sequences longer than W is wide is less than two narrow products for every token, and the fused operators,
which take a whole weight, stay as they are. Libraries of adapters know neither those operators nor weights that are
split over tensor ranks.

Legend: O outputs and I inputs of a product, r rank, T tensor ranks.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from hyena_dist.config.errors import UserError
from hyena_dist.model.initial import initialize
from hyena_dist.model.layers import ColumnLinear, RowLinear, whole
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.placement import ZERO, Placement, Uniform
from hyena_dist.ops.precision import without_autocast

Product = ColumnLinear | RowLinear


class LowRank(nn.Module):
    """This tensor rank's share of the adapter of one product: W [O / T, I] or [O, I / T] -> the weight that is used.

    The factor that touches the split dimension is split as W is. Every tensor rank holds the other factor whole and
    multiplies it with its own share of the first, so that its gradient is summed over them.
    """

    def __init__(self, product: Product, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = product.weight.shape
        self.axis, self.scale = product.axis, alpha / rank
        self.splits_rows = isinstance(product, ColumnLinear)
        self.a = nn.Parameter(product.weight.new_empty(rank, columns))
        self.b = nn.Parameter(product.weight.new_empty(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        a, b = (whole(self.a, self.axis), self.b) if self.splits_rows else (self.a, whole(self.b, self.axis))
        with without_autocast(weight):
            return torch.addmm(weight, b, a, alpha=self.scale)


def add_adapters(model: HyenaModel, *, rank: int, alpha: float, targets: Collection[str], seed: int) -> None:
    """Freeze every weight of a model, and give its products adapters, whose placements are then part of the model's.

    Args:
        targets: names of products in a layer, such as in_proj or fc2; none: every product.
        seed: of the adapters' first values.

    Raises:
        UserError: no layer has a product of such a name, or one is too small for the rank.
    """
    products = dict(_products(model))
    names = sorted({name.rpartition(".")[2] for name in products})
    if unknown := sorted(set(targets) - set(names)):
        raise UserError(f"finetune.lora_targets: no layer of this model has a product {unknown[0]!r}: there are "
                        f"{', '.join(names)}")
    table = model.placement()
    model.requires_grad_(False)
    for name, product in products.items():
        if targets and name.rpartition(".")[2] not in targets:
            continue
        of_weight, splits_rows = table[f"{name}.weight"], isinstance(product, ColumnLinear)
        outputs, inputs = (size * (product.axis.size if dim == of_weight.tp_dim else 1)
                           for dim, size in enumerate(product.weight.shape))
        if rank > min(outputs, inputs):
            raise UserError(f"finetune.lora_rank={rank} is more than {name} has, {min(outputs, inputs)} of its "
                            f"{outputs} x {inputs} weights: lower it")
        product.lora = LowRank(product, rank, alpha)
        placements = {
            f"{name}.lora.a": Placement(tp_dim=None if splits_rows else 1, initial=Uniform(inputs)),
            f"{name}.lora.b": Placement(tp_dim=0 if splits_rows else None, parts=of_weight.parts, initial=ZERO)}
        initialize(product.lora, placements, model.tensor, seed, prefix=f"{name}.lora.")
        model.adapters |= placements


@torch.no_grad()
def merge_adapters(model: HyenaModel) -> None:
    """Put the adapters of a model into its weights, and take them out: the same function by an ordinary model."""
    for _, product in _products(model):
        if product.lora is not None:
            product.weight.copy_(product.used_weight)
            product.lora = None
    model.adapters.clear()


def _products(model: HyenaModel) -> Iterator[tuple[str, Product]]:
    """The products of the layers by their names in the model."""
    for name, module in model.named_modules():
        if isinstance(module, Product):
            yield name, module
