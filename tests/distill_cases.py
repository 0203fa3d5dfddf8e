"""Problems for distillation, and the divergence from its definition in numpy's extended precision."""

import numpy as np
import random_cases
import torch
from exact import EXTENDED, Loss, is_id
from hypothesis import strategies as st

from fastdiff import distill_loss, linear_distill_loss

KINDS = ["forward", "reverse", "forward at ids", "reverse at ids"]


def problem(kind, shape, num_states, dtype=torch.float32, seed=0, spread=3.0, many=5, apart=None, device="cpu"):
    """A student's logits z, and what `distill_loss` needs besides, of a teacher who is `apart` from it, or another."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(*shape, num_states, generator=g, dtype=torch.float64) * spread).to(dtype)
    other = torch.randn(*shape, num_states, generator=g, dtype=torch.float64)
    teacher = (other * spread if apart is None else z.double() + apart * other).to(dtype)
    p = dict(z=z, kl=kind.split()[0], teacher=teacher, mask_index=num_states - 1)
    if kind.endswith("ids"):
        log_p = torch.log_softmax(teacher[..., :-1].double(), -1)
        p |= dict(zip(("teacher", "teacher_ids"), log_p.topk(min(many, num_states - 2), -1), strict=True))
    p["mask"] = torch.rand(shape, generator=g) < 0.6
    p["weight"] = torch.rand(shape, generator=g, dtype=torch.float64)
    return {name: t.to(device) if torch.is_tensor(t) else t for name, t in p.items()}


def linear_problem(kind, shape, num_states, dtype=torch.float32, width=16, device="cpu", **options):
    """The same with hidden states and last layers in the place of logits; the teacher is half as wide."""
    p = problem(kind, shape, num_states, dtype, device=device, **options)
    g = torch.Generator().manual_seed(1)
    del p["z"]
    sizes = dict(hidden=(*shape, width), lm_head=(num_states, width), bias=(num_states,))
    if not kind.endswith("ids"):
        sizes |= dict(teacher=(*shape, width // 2), teacher_lm_head=(num_states, width // 2))
    for name, size in sizes.items():
        p[name] = (torch.randn(size, generator=g, dtype=torch.float64) * width**-0.25).to(device, dtype)
    return p


def loss_of(p, **options):
    given = p | options
    first = [given.pop(name) for name in (("hidden", "lm_head") if "hidden" in p else ("z",))]
    return (linear_distill_loss if "hidden" in p else distill_loss)(*first, **given)


def loss_and_grads(p, *leaves, **options):
    """The loss, and its gradients for the leaves under an upstream gradient that differs from token to token."""
    tensors = {leaf: p[leaf].detach().clone().requires_grad_() for leaf in leaves}
    loss = loss_of(p | tensors, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    loss.backward(upstream if loss.dim() else None)
    return loss.detach(), *(tensor.grad for tensor in tensors.values())


def log_sum_exp(z):
    top = z.max(1, keepdims=True)
    return np.where(
        np.isfinite(top), top + np.log(np.exp(z - np.where(np.isfinite(top), top, 0)).sum(1, keepdims=True)), top
    )


def outcomes(z, teacher, ids, excluded, scale):
    """log q and log p [R, outcomes], and for an id its outcome [R, V], of rows z; excluded is -1 for none."""
    z = np.where(is_id(z, np.full(len(z), excluded)), -np.inf, z * scale)
    outcome = np.broadcast_to(np.arange(z.shape[1]), z.shape)
    log_q = z - log_sum_exp(z)
    if ids is None:
        t = np.where(is_id(z, np.full(len(z), excluded)), -np.inf, teacher * scale)
        return log_q, t - log_sum_exp(t), outcome
    total = np.exp(teacher).sum(1, keepdims=True)
    rest = np.log(np.maximum(1 - total, 0))
    chosen = (outcome[:, :, None] == ids[:, None, :]).any(2)
    others = log_sum_exp(np.where(chosen, -np.inf, log_q))
    at_ids = np.take_along_axis(log_q, ids, 1)
    outcome = np.where(chosen, (outcome[:, :, None] == ids[:, None, :]).argmax(2), ids.shape[1])
    log_p = np.concatenate([teacher - np.log(np.maximum(total, 1)), rest], 1)
    return np.concatenate([at_ids, others], 1), log_p, outcome


@np.errstate(all="ignore")
def distill(z, teacher, ids, excluded, scale, reverse):
    """KL(p || q), or KL(q || p), and its gradient for z."""
    log_q, log_p, outcome = outcomes(z, teacher, ids, excluded, scale)
    d = np.where(log_q == log_p, 0, log_q - log_p)
    log_a, d_a = (log_q, -d) if reverse else (log_p, d)  # the first of the two
    a = np.exp(log_a)
    terms = np.where(a == 0, np.exp(log_a + d_a), a * (np.expm1(d_a) - d_a))
    terms = np.where(np.isneginf(d_a), np.inf, np.where(np.isposinf(d_a), np.exp(log_q + log_p - log_a), terms))
    loss, q, p = terms.sum(1), np.exp(log_q), np.exp(log_p)
    # By the rounding of exp, and of d: an error e in it adds (q - p) e + p e^2 / 2 to the loss.
    left_out = is_id(z, np.full(len(z), excluded))  # which is not read, not even for NaN
    both = (z, teacher) if ids is None else (z,)
    sums = [abs(log_sum_exp(np.where(left_out, -np.inf, x * scale))) for x in both]
    rounded = np.where(np.isfinite(d), abs(d), 0) + sum(sums)
    size = 1 + np.where(np.isfinite(log_a), abs(log_a), 0) / 8
    loss_size = (terms * size + abs(q - p) * rounded + 1e-9 * p * rounded**2).sum(1)
    slope = np.where(q == 0, 0, q * (d - loss[:, None])) if reverse else q - p
    slope_size = abs(slope) * size + (q + p) * rounded + reverse * q * loss_size[:, None]
    share = np.ones_like(z)
    if ids is not None:
        within = log_softmax(z, excluded, scale) - np.take_along_axis(log_q, outcome, 1)
        share = np.where(np.isfinite(within), np.exp(within), 0)
    grad = np.where(left_out, 0, scale * share * np.take_along_axis(slope, outcome, 1))
    return Loss(loss, grad, loss_size, scale * slope_size.max(1, keepdims=True))


def log_softmax(z, excluded, scale):
    z = np.where(is_id(z, np.full(len(z), excluded)), -np.inf, z * scale)
    return z - log_sum_exp(z)


@random_cases.with_poisoned_buffers
def check_distill(draw, backend, device="cpu"):
    """A random case against the definition. Rows are left out whose loss is not finite, or whose numbers, divided by
    the temperature, leave the range of their type."""
    z, _, masked, mask_index, g = random_cases.rows(draw, draw(st.booleans()), backend, device)
    shape, num_states, dtype = z.shape[:-1], z.shape[-1], z.dtype
    numbers = z.cpu().double()
    apart = draw(st.sampled_from([0.0, 1e-3, 1.0, None]))
    teacher = torch.randn(z.shape, generator=g, dtype=torch.float64) * (2 if apart is None else apart)
    teacher = teacher if apart is None else numbers + teacher
    if draw(st.booleans()):
        hit = torch.rand(z.shape, generator=g) < draw(st.sampled_from([0.01, 0.5]))
        teacher = torch.where(hit, random_cases.extremes(draw, z.shape, dtype, g), teacher)
    teacher = teacher.to(dtype)
    excluded = mask_index if draw(st.booleans()) else -1
    many = draw(st.sampled_from([0, 1, 3, 20]))
    options = dict(kl=draw(st.sampled_from(["forward", "reverse"])), temperature=draw(st.sampled_from([1.0, 0.7, 3.0])))
    options |= dict(mask_index=mask_index, exclude_mask=excluded >= 0, weight=random_cases.weights(draw, shape, g))
    options["reduction"] = draw(st.sampled_from(["none", "sum", "mean"]))
    ids = None
    if many and num_states > 1 + many:
        order = torch.rand(z.shape, generator=g)
        order[..., mask_index] = 2
        ids = order.argsort(-1)[..., :many]
        log_p = torch.log_softmax(torch.nan_to_num(teacher.double(), 0, 50, -50).clamp(-50, 50), -1)
        teacher = log_p.gather(-1, ids).to(draw(st.sampled_from([torch.float32, torch.float64])))
        options["teacher_ids"] = ids
    else:
        teacher = random_cases.laid_out(draw, teacher.to(device)).cpu() if len(teacher) else teacher
    scale, reverse = EXTENDED(1 / options["temperature"]), options["kl"] == "reverse"

    def of_rows(z, scored):
        given = teacher.double()[scored].numpy().astype(EXTENDED)
        return distill(z, given, None if ids is None else ids[scored].numpy(), excluded, scale, reverse)

    every = torch.ones(shape, dtype=torch.bool)
    found = of_rows(numbers.reshape(-1, num_states).numpy().astype(EXTENDED), every)
    finite = np.isfinite(found.loss.astype(np.float64)) & np.isfinite(found.grad.astype(np.float64)).all(1)
    reach = torch.finfo(torch.promote_types(dtype, torch.float32)).max / 4
    for x in (numbers, teacher.double()):
        size = np.abs(np.nan_to_num(x.numpy(), posinf=0, neginf=0)) * scale
        finite &= (size < reach).reshape(len(finite), x.shape[-1]).all(1)
    scored = masked & torch.from_numpy(finite).view(shape)
    options |= dict(mask=scored, teacher=teacher.to(device))
    given = lambda leaf, **more: distill_loss(leaf, **more)  # noqa: E731
    random_cases.agree(given, z, backend, options, options["weight"], scored, lambda z: of_rows(z, scored), slack=2)
