"""How many rows of logits a step makes at once."""

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Rows(TorchDispatchMode):
    """The most rows of V ids, or of a rank's, that are made at once."""

    def __init__(self, num_states):
        super().__init__()
        self.num_states, self.most = num_states, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            one = one.to_local() if isinstance(one, DTensor) else one
            if not isinstance(one, torch.Tensor) or one.dim() < 2 or one.shape[-1] != self.num_states:
                continue
            if one.untyped_storage().nbytes() >= one.numel() * one.itemsize:  # not one number, expanded
                self.most = max(self.most, one.shape[:-1].numel())
        return result
