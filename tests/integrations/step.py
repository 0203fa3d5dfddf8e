"""One training step before and after: its loss and gradients, and a watch for logits."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoLogits(TorchDispatchMode):
    """Fails where an operator gives a tensor of so many numbers or more."""

    def __init__(self, *shape):
        super().__init__()
        self.numbers = torch.Size(shape).numel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            size = tensor.untyped_storage().nbytes() // tensor.itemsize if isinstance(tensor, torch.Tensor) else 0
            assert size < self.numbers, f"{func} makes logits"
        return made


def loss_and_grads(loss_of, module, *arguments):
    """The loss, and the gradients of all parameters of the module by their names, one after another."""
    module.zero_grad()
    loss = loss_of(*arguments)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same_step(got, expected, rtol=1e-10):
    """To a share of the largest number of each tensor."""
    for ours, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * theirs.abs().max().item(), check_dtype=False)
