"""Other libraries' fused cross-entropies, those that are installed; they run on a GPU only.

Labels of -100 score nothing. They take no weights; what a diffusion loss needs besides is left out in their favour.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

from torch import Tensor

Calls = dict[str, Callable[[], Tensor]]


def cross_entropies(z: Tensor, labels: Tensor) -> Calls:
    """From logits [rows, V]. Liger's writes the gradient over the logits."""
    found: Calls = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["Liger"] = partial(liger_cross_entropy, z, labels, reduction="sum")
    if importlib.util.find_spec("quack"):
        from quack.cross_entropy import cross_entropy

        found["quack"] = partial(cross_entropy, z, labels, reduction="sum")
    return found


def linear_cross_entropies(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Calls:
    """From hidden states [rows, D] and weights [V, D]."""
    found: Calls = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger"] = partial(liger_fused_linear_cross_entropy, hidden, lm_head, labels, reduction="sum")
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = partial(linear_cross_entropy, hidden, lm_head, labels, reduction="sum")
    if importlib.util.find_spec("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        found["quack"] = partial(chunked_linear_cross_entropy, hidden, lm_head, labels, reduction="sum")
    return found
