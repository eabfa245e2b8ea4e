from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqmodels import backend
from seqmodels.ops.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy


def inputs(
    dtype: torch.dtype = torch.float64, tokens: int = 11, width: int = 5, vocabulary: int = 13
) -> tuple[Tensor, ...]:
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[::4] = IGNORE_INDEX
    return hidden, weight, targets


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("chunk_size", [1, 3, 11, 100, None])
def test_loss_and_gradients_are_those_of_whole_logits(name: str, chunk_size: int | None) -> None:
    hidden, weight, targets = inputs()
    expected = dense(hidden, weight, targets)
    wanted = torch.autograd.grad(1.7 * expected, (hidden, weight))
    with backend(name):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
        found = torch.autograd.grad(1.7 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    for actual, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_frozen_input(frozen: str) -> None:
    hidden, weight, targets = inputs()
    live = weight if frozen == "hidden" else hidden
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    (wanted,) = torch.autograd.grad(dense(hidden, weight, targets), live)
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), live)
    torch.testing.assert_close(found, wanted)


def test_reference_passes_gradcheck() -> None:
    hidden, weight, targets = inputs(tokens=4, width=3, vocabulary=5)
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


def test_registration() -> None:
    for dtype, with_gradients in ((torch.float64, True), (torch.float32, False)):
        hidden, weight, targets = inputs(dtype)
        if not with_gradients:
            hidden, weight = hidden.detach(), weight.detach()
        args = (hidden, weight, targets, 4, with_gradients, "torch")
        torch.library.opcheck(torch.ops.seqmodels.linear_cross_entropy.default, args)


def test_low_precision_errs_no_more_than_whole_logits_do() -> None:
    hidden, weight, targets = inputs(torch.float32, tokens=64, width=32, vocabulary=100)
    exact_inputs = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (hidden, weight)]
    exact = torch.autograd.grad(dense(*exact_inputs, targets), exact_inputs)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    ours = torch.autograd.grad(linear_cross_entropy(*low, targets, chunk_size=16), low)
    theirs = torch.autograd.grad(dense(*low, targets), low)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine - true).norm() <= 2 * (other - true).norm()


def test_autocast_keeps_a_float32_weight_gradient() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (hidden, weight))
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float32]
    torch.testing.assert_close(loss, dense(hidden, weight, targets), rtol=0.02, atol=0)


def test_whole_logits_never_exist() -> None:
    """The largest tensor that any operation makes is the weight's gradient or a chunk's logits."""
    hidden, weight, targets = inputs(torch.float32, tokens=256, width=8, vocabulary=1000)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
            return result

    from seqmodels.ops.linear_cross_entropy import torch as chunked

    with torch.no_grad(), Largest() as largest:
        chunked.forward(hidden, weight, targets, 16, True)
    assert largest.size == 16 * 1000 < 256 * 1000
    with torch.no_grad(), Largest() as largest:
        chunked.forward(hidden, weight, targets, 256, True)
    assert largest.size == 256 * 1000  # the measurement sees them where they exist


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"expected \(tokens, d_model\)"):
        linear_cross_entropy(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"expected \(11,\), one a token"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="chunk_size is 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_size=0)
