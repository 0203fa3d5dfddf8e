"""Concrete score matching (Meng et al. 2022): the squared distance of a network's ratios from those of the noise."""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdiff import reference
from fastdiff.checks import Number, check_choice, vocabulary_index
from fastdiff.losses.linear_losses import last_layer, last_layer_loss
from fastdiff.losses.row_losses import checked_rows, logits_loss
from fastdiff.ops.functors import FUNCTORS, Functor
from fastdiff.ops.row_loss import Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FUNCTORS["csm_absorb"] = Functor(
    lambda r: reference.csm_absorb(r.z, r.sigma, r.xt, r.x0, r.mask_index), of_scores=True, over_ranks="sum"
)
FUNCTORS["csm_uniform"] = Functor(
    lambda r: reference.csm_uniform(r.z, r.sigma, r.xt, r.x0),
    masked=False,
    apart="xt",
    of_scores=True,
    clean=True,
    over_ranks="sum",
)


def csm_loss(
    log_score: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    graph: str = "absorb",
    dsigma: Number | Tensor | None = None,
    mask_index: int = -1,
    parametrization: str = "log_score",
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """Concrete score matching `(1/2) sum_{y != x_t} (exp(s_y) - a_y)^2`, a_y = p(y | x0) / p(x_t | x0), times dsigma.

    In the mean over x0 it is least where exp(s_y) is p_t(y) / p_t(x_t), as `dse_loss` is, but no bound of a likelihood.
    Absorbing, a masked token is scored, y runs over all ids but the mask, and a is 1 / expm1(sigma) at x0 and 0
    elsewhere; uniform, every token is scored.

    Args:
        log_score: [..., V] as in `dse_loss`.
        sigma, xt, x0, graph, dsigma, mask_index, reduction, num_items, group: as in `dse_loss`.
        parametrization: "log_score", or "scale_by_sigma", as in `dse_loss`.

    Returns:
        float32 (float64 for float64 log_score) [...] or [].

    Raises:
        ValueError, TypeError: as `dse_loss`.
        BackendUnavailable: the backend named cannot run here.
    """
    options: dict[str, Any] = dict(graph=graph, dsigma=dsigma, mask_index=mask_index, parametrization=parametrization)
    make_rows = partial(csm_rows, reduction=reduction, num_items=num_items, **options)
    return logits_loss("log_score", log_score, make_rows, (sigma, xt, x0), group, backend)[0]


def linear_csm_loss(
    hidden: Tensor,
    lm_head: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    summed: bool = False,
    capacity: int | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """`csm_loss` of what hidden @ lm_head.T + bias gives, which is never whole in memory.

    Args:
        hidden, lm_head, bias, softcap, summed, capacity, group: as in `linear_dce_loss`.
        sigma, xt, x0, options, backend: as in `csm_loss`, with [...] the shape of hidden without D.

    Returns:
        float32 (float64 for float64 inputs) [...] or [].

    Raises:
        ValueError, TypeError: as `csm_loss`; shapes, types or devices of hidden, lm_head and bias do not fit.
        BackendUnavailable: the backend named cannot run here.
    """
    head = last_layer(hidden, lm_head, bias, softcap, capacity, group)
    return last_layer_loss(head, partial(csm_rows, **options), (sigma, xt, x0), backend, summed)[0]


def csm_rows(
    z: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    graph: str = "absorb",
    mask_index: int = -1,
    parametrization: str = "log_score",
    dsigma: Number | Tensor | None = None,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
) -> Rows:
    """The checked arguments of concrete score matching over rows z, of which only type, shape and device are looked
    at."""
    check_choice("graph", graph, ("absorb", "uniform"))
    check_choice("parametrization", parametrization, ("log_score", "scale_by_sigma"))
    if z.shape[-1] < 2:
        raise ValueError(f"log_score: expected at least 2 states, got shape {tuple(z.shape)}")
    options: dict[str, Any] = dict(xt=xt, sigma=sigma, dsigma=dsigma, reduction=reduction, num_items=num_items)
    options |= dict(mask_index=vocabulary_index("mask_index", mask_index, z.shape[-1]))
    return checked_rows(f"csm_{graph}", z, x0, scale_by_sigma=parametrization == "scale_by_sigma", **options)
