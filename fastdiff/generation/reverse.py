"""One step of the noise process run backwards: the law of each token, as a draw or as a row of probabilities."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.checks import Number, check_choice, check_rows, check_values, per_token, vocabulary_index
from fastdiff.generation.tokens import Names, check_temperature, token_rows
from fastdiff.losses.row_losses import PARAMETRIZATIONS
from fastdiff.ops.row_sample import SampleRows, reverse_rows, row_sample


def reverse_step(
    log_score: Tensor,
    xt: Tensor,
    sigma: Number | Tensor,
    *,
    sigma_next: Number | Tensor | None = None,
    step_size: Number | Tensor | None = None,
    graph: str = "absorb",
    mask_index: int = -1,
    parametrization: str = "log_score",
    exclude: Iterable[int] = (),
    temperature: float = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws x_s given x_t, each token by itself, from one read of its row. Absorbing: rows of masks only.

    With sigma_next (Tweedie; SEDD's analytic step, MDLM's and Duo's posterior) p(x_s | x_t) is proportional to
    (exp(-dS Q) score)_y exp(dS Q)(x_t, y), dS = sigma - sigma_next; with step_size (Euler) it is delta +
    step_size Qbar. Entries below 0 count as 0. To sigma_next = 0 no mask stays.

    Args:
        log_score: [B, L, V] rows as `parametrization` says: "log_score", "scale_by_sigma", see `dse_loss`, or "logits"
            ("log_probs") of the conditionals p(x_0 | x_t), for either graph. float32, float64, bfloat16 or float16.
        xt: [B, L] int64 tokens.
        sigma: total noise > 0, a number or a tensor over a prefix of [B, L], or one that broadcasts to it.
        sigma_next: total noise in [0, sigma), likewise. step_size: dt dsigma > 0, likewise. One of the two is given.
        graph: "absorb" or "uniform". mask_index: the mask's id (absorb). exclude: ids never to draw (absorb).
        temperature: >= 0; the law of the token that replaces x_t is raised to 1 / temperature; whether it is replaced
            does not change.
        seed, step, sample_ids, generator, backend: as in `sample_tokens`.

    Returns:
        int64 [B, L].

    Raises:
        ValueError, TypeError: an argument does not fit.
        BackendUnavailable: the backend named cannot run here.
    """
    names = (seed, step, sample_ids, generator)
    rows, law = _rows(log_score, xt, sigma, sigma_next, step_size, graph, mask_index, parametrization, exclude, names)
    rows.law, rows.temperature = law, check_temperature(temperature)
    return row_sample(rows, backend).tokens


def reverse_probs(
    log_score: Tensor,
    xt: Tensor,
    sigma: Number | Tensor,
    *,
    sigma_next: Number | Tensor | None = None,
    step_size: Number | Tensor | None = None,
    graph: str = "absorb",
    mask_index: int = -1,
    parametrization: str = "log_score",
    backend: str | None = None,
) -> Tensor:
    """p(x_s | x_t) for each token by itself, the law that `reverse_step` draws from: float32 [B, L, V].

    Only backend "reference" has its gradient.

    Args, Raises: as `reverse_step`.
    """
    nameless = (0, 0, None, None)
    rows, law = _rows(log_score, xt, sigma, sigma_next, step_size, graph, mask_index, parametrization, (), nameless)
    return reverse_rows(rows, law, backend)


def _rows(
    log_score: Tensor,
    xt: Tensor,
    sigma: Number | Tensor,
    sigma_next: Number | Tensor | None,
    step_size: Number | Tensor | None,
    graph: str,
    mask_index: int,
    parametrization: str,
    exclude: Iterable[int],
    names: Names,
) -> tuple[SampleRows, Tensor]:
    check_rows("log_score", log_score)
    check_choice("graph", graph, ("absorb", "uniform"))
    exclude, mask = tuple(exclude), None
    if graph == "absorb":
        mask = vocabulary_index("mask_index", mask_index, log_score.shape[-1])
    elif exclude:
        raise ValueError(f"exclude: needs graph='absorb', got {exclude}")
    # Where ids are excluded so is the mask, which nothing turns into: one id is to be left.
    rows = token_rows(log_score, xt, None, mask, bool(exclude), exclude, names)
    return rows, reverse_law(graph, parametrization, rows.xt, log_score.shape[-1], sigma, sigma_next, step_size)


def reverse_law(
    graph: str,
    parametrization: str,
    xt: Tensor,
    num_states: int,
    sigma: Number | Tensor,
    sigma_next: Number | Tensor | None,
    step_size: Number | Tensor | None,
) -> Tensor:
    """What `reference.reverse_weights` needs to know of each token: theta, kappa, lam, log_here, float64 [..., 4]."""
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    sigma = per_token("sigma", sigma, xt.shape, xt.device)
    check_values("sigma", sigma, ~((sigma > 0) & sigma.isfinite()), "finite numbers > 0")
    if step_size is None and sigma_next is not None:
        after = per_token("sigma_next", sigma_next, xt.shape, xt.device)
        check_values("sigma_next", after, ~((after >= 0) & (after < sigma)), "numbers in [0, sigma)")
        leave = 1 / torch.expm1(sigma - after)  # alpha_ts / (1 - alpha_ts)
    elif step_size is not None and sigma_next is None:
        after = per_token("step_size", step_size, xt.shape, xt.device)
        check_values("step_size", after, ~((after > 0) & after.isfinite()), "finite numbers > 0")
        leave = 1 / after
    else:
        raise ValueError(f"sigma_next, step_size: expected one of the two, got {sigma_next} and {step_size}")
    euler = step_size is not None
    if parametrization in ("logits", "log_probs"):
        law = _absorb_law if graph == "absorb" else _uniform_law
        return torch.stack(torch.broadcast_tensors(*law(sigma, after, leave, num_states, euler)), -1)
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    log_here = reference.sigma_shift(sigma, num_states) if parametrization == "scale_by_sigma" else zero
    if graph == "absorb":
        stays = one if euler else (after > 0).double()
        return torch.stack([zero, (1 + leave) * stays, stays, log_here], -1)
    theta, kappa = zero if euler else -torch.expm1(after - sigma) / num_states, 1 + num_states * leave
    return torch.stack([theta, kappa, one if euler else kappa * theta, log_here], -1)


_MOST = 1e20  # of expm1(sigma): beyond, conditionals are forgotten anyway, and float32 would overflow


def _absorb_law(sigma: Tensor, after: Tensor, leave: Tensor, num_states: int, euler: bool) -> list[Tensor]:
    """From conditionals: a mask stays with probability q, so its weight is q / (1 - q) times that of the others."""
    e1, zero = torch.expm1(sigma), torch.zeros_like(sigma)
    odds = (e1 * leave - 1).clamp_min(0) if euler else torch.expm1(after) * (1 + leave)
    return [zero, zero, -odds, zero - torch.inf]


def _uniform_law(sigma: Tensor, after: Tensor, leave: Tensor, num_states: int, euler: bool) -> list[Tensor]:
    """From conditionals: p_t(y) is proportional to e_y + T e1 / N."""
    noise = torch.expm1(sigma if euler else after).clamp_max(_MOST) / num_states
    kappa = 1 + num_states * leave
    lam = 1 + noise * (num_states - 1 - num_states * leave) if euler else -kappa * noise
    return [-noise, kappa, lam, torch.full_like(sigma, torch.nan)]
