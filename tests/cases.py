"""Problems for the row losses and what they must agree to, shared by the tests of every backend."""

import math

import torch

import fastdiff
from fastdiff import dce_loss

# Largest error against float64, relative to the largest number of the result.
# 16-bit types: one unit in the last place, by which roundings of nearly equal numbers may differ.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
LOSSES = [
    "dce",
    "dce_all",
    "dce_z",
    "absorb",
    "absorb_logits",
    "absorb_scaled",
    "uniform",
    "uniform_scaled",
    "uniform_logits",
    "csm_absorb",
    "csm_uniform",
    "loo",
    "d3pm_uniform",
    "mixture",
]


def problem(shape, num_states, dtype=torch.float32, seed=0, spread=3.0, mask_index=None, device="cpu"):
    """Logits, noised and clean tokens, sigma per sequence and a weight per token."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(*shape, num_states, generator=g, dtype=torch.float64) * spread).to(dtype)
    mask_index = num_states - 1 if mask_index is None else mask_index
    x0 = torch.randint(0, num_states - 1, shape, generator=g)
    x0 += x0 >= mask_index
    masked = torch.rand(shape, generator=g) < 0.5
    xt = torch.where(masked, mask_index, x0)
    moved = torch.where(masked, torch.randint(0, num_states, shape, generator=g), x0)
    sigma = torch.rand(shape[0], generator=g, dtype=torch.float64) * 2 + 0.05
    weight = torch.rand(shape, generator=g, dtype=torch.float64)
    mixed = torch.where(torch.rand(shape, generator=g) < 0.5, xt, moved)
    step = torch.randint(1, 5, shape[:1], generator=g)
    share = torch.rand(shape[0], generator=g, dtype=torch.float64)
    tensors = dict(z=z, x0=x0, xt=xt, moved=moved, mixed=mixed, sigma=sigma, step=step, share=share, weight=weight)
    return {name: t.to(device) for name, t in tensors.items()} | dict(mask_index=mask_index)


def linear_problem(shape, num_states, dtype=torch.float32, width=16, bias=True, **options):
    """The same with hidden states, a last layer and its bias in the place of logits."""
    p = problem(shape, num_states, dtype, **options)
    g = torch.Generator().manual_seed(options.get("seed", 0) + 1)
    sizes = dict(hidden=(*shape, width), lm_head=(num_states, width)) | (dict(bias=(num_states,)) if bias else {})
    device = p.pop("z").device
    for name, size in sizes.items():
        p[name] = (torch.randn(size, generator=g, dtype=torch.float64) * width**-0.25).to(device, dtype)
    return p


def loss_of(name, p, **options):
    """A loss by its name, over logits z, or over hidden states and a last layer if p has those."""
    linear = "hidden" in p
    rows = (p["hidden"], p["lm_head"]) if linear else (p["z"],)
    options |= dict(bias=p.get("bias")) if linear else {}
    if linear and name.startswith("csm"):
        rows = (p["hidden"] / 4, p["lm_head"])  # a 16-bit logit's rounding counts twice
    loss, given, fixed = _call(name, p)
    return getattr(fastdiff, "linear_" * linear + loss)(*rows, *(p[x] for x in given), **(fixed | options))


def _call(name, p):
    """The public function of a loss, the names of its arguments after the rows, and its options."""
    graph, _, form = name.partition("_")
    weight, place = dict(weight=p["weight"]), dict(mask_index=p["mask_index"])
    if graph == "dce":
        return (
            "dce_loss",
            ["x0"],
            weight | place | dict(xt=p["xt"], exclude_mask=form != "all", z_loss=0.1 if form == "z" else 0.0),
        )
    if graph == "loo":
        return "loo_loss", ["sigma", "moved", "x0"], weight | dict(z_loss=0.1)
    if graph == "d3pm":
        return "d3pm_loss", ["step", "moved", "x0"], weight | dict(num_steps=4, graph=form, auxiliary=0.1)
    if graph == "mixture":
        return "mixture_loss", ["sigma", "share", "mixed", "x0"], weight | place
    loss = "dse_loss"
    if graph == "csm":
        loss, (graph, _, form) = "csm_loss", form.partition("_")
    form = {"": "log_score", "logits": "logits", "scaled": "scale_by_sigma"}[form]
    fixed = dict(graph=graph, dsigma=p["weight"], parametrization=form)
    return loss, ["sigma", "xt" if graph == "absorb" else "moved", "x0"], fixed | place


def large_scores(graph, dtype=torch.float32, device="cpu"):
    """Rows of 1000 equal scores whose terms, or their sums, leave the type without their weight, with what `dse_loss`
    needs besides; their losses and the gradients of scores of neither x0 nor x_t."""
    z = torch.tensor([-1e38, 100.0, 1000.0], dtype=dtype, device=device)[:, None].repeat(1, 1000)
    weight = torch.tensor([1.0, 1e-30, 0.0], dtype=torch.float64, device=device)
    xt = torch.zeros(3, dtype=torch.long, device=device)
    options = dict(graph=graph, sigma=1.0, dsigma=weight, mask_index=0, xt=xt, x0=xt + (graph == "absorb"))
    e1, huge = math.expm1(1.0), 1e-30 * math.exp(100)
    r = e1 / (e1 + 1000)
    if graph == "absorb":
        return z, options, torch.tensor([1e38 / e1, 999 * huge, 0]), torch.tensor([0, huge, 0])
    return z, options, 0.999 * torch.tensor([r * 1e38, huge, 0]), torch.tensor([-r, huge, 0]) / 1000


def largest_logits(dtype, device="cpu"):
    """Logits [3, 9] of plus and minus the largest number: all alike, one of them x0's above, x0's below all others."""
    z = torch.full((3, 9), -torch.finfo(dtype).max, dtype=dtype, device=device)
    z[1, 4] *= -1
    z[2] *= -1
    z[2, 4] *= -1
    return z, torch.full((3,), 4, device=device)


def tiny_loss(backend, device="cpu"):
    """A loss of which a sum that holds x0's 1 would keep few digits, and what it is."""
    logits, x0 = torch.tensor([[40.0, 12.0]], device=device), torch.tensor([0], device=device)
    return dce_loss(logits, x0, exclude_mask=False, backend=backend), math.log1p(math.exp(-28.0))


def largest_drift(backend, device="cpu"):
    """The gradient of a z-loss where float32 has no room for what multiplies exponentials, and what it is."""
    z = torch.full((2, 9), -torch.finfo(torch.float32).max, device=device)
    z[:, 3] *= -1
    z.requires_grad_()
    x0, weight = torch.tensor([3, 4], device=device), torch.tensor([1e30, -1e30], device=device)
    loss = dce_loss(z, x0, weight=weight, z_loss=0.1, exclude_mask=False, backend=backend)
    expected = torch.zeros(2, 9)
    expected[:, 3] = torch.tensor([torch.inf, -torch.inf])
    expected[1, 4] = 1e30
    return torch.autograd.grad(loss.sum(), z)[0].cpu(), expected


def loss_and_grad(name, p, **options):
    return loss_and_grads(name, p, "z", **options)


def loss_and_grads(name, p, *leaves, **options):
    """The loss, and its gradients for the leaves under an upstream gradient that differs from token to token."""
    tensors = {leaf: p[leaf].detach().clone().requires_grad_() for leaf in leaves}
    loss = loss_of(name, p | tensors, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    loss.backward(upstream if loss.dim() else None)
    return loss.detach(), *(tensor.grad for tensor in tensors.values())


def assert_near(got, expected, dtype, name, slack=1):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.numel():
        expected = expected.double()
        error = (got.double() - expected).abs().max()
        assert error <= slack * TOLERANCE[dtype] * expected.abs().max().clamp_min(1e-30), f"{name}: error {error:.3g}"
