"""Passes with gradients in the memory of one: what backward needs of a pass, it makes anew."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

_ALIKE = 1e-2  # nats, and relative: what kernels whose sums have no fixed order may differ by, and dropout does not


def replayed(losses: Callable[[], Tensor]) -> Tensor:
    """What a pass of a network and its losses give, without their graph: backward calls both again, dropout as it was.

    Raises:
        RuntimeError: in backward, where the second call does not give the losses of the first, or meets weights that
            have changed in between.
    """
    first: list[Tensor] = []
    weights: list[tuple[Tensor, int]] = []

    def run() -> Tensor:
        if not first:
            found = losses()
            first.append(found.detach())
            weights.extend((leaf, leaf._version) for leaf in _leaves(found))
            return found
        if any(leaf._version != version for leaf, version in weights):
            raise RuntimeError("differentiable: weights have changed between the passes and their backward")
        again = losses()
        if not torch.allclose(again.detach(), first[0], rtol=_ALIKE, atol=_ALIKE, equal_nan=True):
            raise RuntimeError(
                "differentiable: a pass gave other losses when backward ran it again; dropout must draw from torch's "
                "generator, and weights must stay as they are until backward"
            )
        return again

    with set_checkpoint_early_stop(False):  # or the losses of the second call would not come about
        return checkpoint(run, use_reentrant=False)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Tensors whose gradient is asked for."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes.extend(function for function, _ in node.next_functions)
