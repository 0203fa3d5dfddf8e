"""Problems for the row losses and what they must agree to, shared by the tests of every backend."""

import torch

from fastdiff import dce_loss, dse_loss

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
    tensors = dict(z=z, x0=x0, xt=xt, moved=moved, sigma=sigma, weight=weight)
    return {name: t.to(device) for name, t in tensors.items()} | dict(mask_index=mask_index)


def loss_of(name, p, **options):
    z, x0, mask_index = p["z"], p["x0"], p["mask_index"]
    if name.startswith("dce"):
        options |= dict(xt=p["xt"], weight=p["weight"], mask_index=mask_index, exclude_mask=name != "dce_all")
        options["z_loss"] = 0.1 if name == "dce_z" else 0.0
        return dce_loss(z, x0, **options)
    graph, _, form = name.partition("_")
    form = {"": "log_score", "logits": "logits", "scaled": "scale_by_sigma"}[form]
    options |= dict(graph=graph, dsigma=p["weight"], mask_index=mask_index, parametrization=form)
    return dse_loss(z, p["sigma"], p["xt" if graph == "absorb" else "moved"], x0, **options)


def loss_and_grad(name, p, **options):
    z = p["z"].detach().clone().requires_grad_()
    loss = loss_of(name, {**p, "z": z}, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    upstream = upstream if loss.dim() else None
    loss.backward(upstream)
    return loss.detach(), z.grad


def assert_near(got, expected, dtype, name, slack=1):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.numel():
        expected = expected.double()
        error = (got.double() - expected).abs().max()
        assert error <= slack * TOLERANCE[dtype] * expected.abs().max().clamp_min(1e-30), f"{name}: error {error:.3g}"
