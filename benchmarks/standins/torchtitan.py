"""torchtitan: cross-entropy of every row's logits, as its losses take it, with weights; what the seam builds on.

The package itself where it is installed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from standins import Network, Problem

INSTALLED = find_spec("torchtitan") is not None
IGNORE_INDEX = -100


class BaseLoss:
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


class ChunkedLossWrapper(BaseLoss):
    def set_lm_head(self, lm_head: nn.Module) -> None:
        self.lm_head = lm_head

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        raise NotImplementedError


class _Configured:
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


class Decoder(_Configured): ...


class FlexAttention(_Configured): ...


class ScaledDotProductAttention(_Configured): ...


class Trainer(_Configured): ...


class Validator(_Configured): ...


class VarlenAttention(_Configured): ...


def current_spmd_mesh() -> Any:
    return None


def spmd_mesh_size(axis_name: str) -> int:
    return 1


MODULES = (
    "spmd_types",
    "torchtitan.components.loss",
    "torchtitan.components.validate",
    "torchtitan.distributed.spmd_types",
    "torchtitan.models.common.attention",
    "torchtitan.models.common.decoder",
    "torchtitan.trainer",
)
if INSTALLED:
    from fastdiff.integrations import torchtitan
else:
    sys.modules.update(dict.fromkeys(MODULES, sys.modules[__name__]))
    from fastdiff.integrations import torchtitan

    for module in MODULES:
        del sys.modules[module]


def labels_of(x0: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """As the seam's loss takes them."""
    return torch.complex(torch.where(mask, x0, IGNORE_INDEX).double(), weight.double().expand(x0.shape))


def published_loss(pred: Tensor, labels: Tensor, mask_index: int, global_valid_tokens: int) -> Tensor:
    logits = pred.index_fill(-1, torch.tensor([mask_index], device=pred.device), -torch.inf)
    x0 = labels.real.long().flatten()
    nll = F.cross_entropy(logits.flatten(0, 1), x0, ignore_index=IGNORE_INDEX, reduction="none")
    return (nll * labels.imag.flatten()).sum() / global_valid_tokens


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    weight = (p.dsigma / torch.expm1(p.sigma))[:, None]
    labels, tokens = labels_of(p.x0, p.xt == p.mask_index, weight), torch.tensor(3 * p.x0.numel())
    loss_fn = torchtitan.MaskedDiffusionLoss(torchtitan.MaskedDiffusionLoss.Config(mask_index=p.mask_index))

    def ours(network: Network) -> Tensor:
        loss_fn.set_lm_head(network.lm_head)
        batch, length = p.x0.shape
        return loss_fn(network.hidden[:batch, :length], labels, tokens)[0]

    return {
        "masked diffusion": (
            lambda network: published_loss(network(p.xt).logits, labels, p.mask_index, p.x0.numel() * 3),
            ours,
        )
    }
