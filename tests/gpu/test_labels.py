"""Labels that are no tokens, where to ask would be to wait for the device: the loss and its gradient are NaN."""

import pytest
import torch

from hyena_dist.model import loss
from hyena_dist.model.loss import token_loss
from tests.gpu.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label", [-1, 16, 99])
def test_a_label_outside_the_vocabulary_makes_the_step_not_finite(device: torch.device, label: int,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "refuse_outside", loss.refuse_outside if device.type == "cuda" else lambda *_, **__: None)
    logits, targets = torch.randn(2, 5, 16, device=device, requires_grad=True), torch.full((2, 5), 7, device=device)
    wrong = targets.clone()
    wrong[1, 3] = label
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        good, _ = token_loss(logits, targets)
        good.backward()
        assert logits.grad is not None
        good_grad, logits.grad = logits.grad, None
        bad, _ = token_loss(logits, wrong)
        bad.backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert good.isfinite()
    assert good_grad.isfinite().all(), "control: of labels in the vocabulary"
    assert bad.isnan()
    assert logits.grad is not None
    assert logits.grad[1, 3].isnan().all()
