"""Log-probabilities and entropies of the GPU backends against the reference."""

import pytest
import torch
from cases import assert_near, linear_problem, problem

import fastdiff.ops.chunks as op
from fastdiff import linear_token_logps, token_logps

LEAVES = ("hidden", "lm_head", "bias")


def agree(call, backend, leaves, dtype, slack=1):
    results = []
    for b in (backend, "reference"):
        logps, entropy = call(*leaves, backend=b)
        upstream = torch.linspace(-1, 2, logps.numel(), device=logps.device).view(logps.shape)
        loss = (logps * upstream + entropy * upstream.flip(0)).sum()
        results.append((logps.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)))
    for i, (got, expected) in enumerate(zip(*results, strict=True)):
        assert_near(got, expected, torch.float32 if i < 2 and slack == 1 else dtype, f"result {i}", slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_logits(dtype, backend, device):
    for num_states in (2, 61, 4107):
        p = problem((2, 3), num_states, dtype, spread=1.0, device=device)

        def call(z, backend, p=p):
            options = dict(mask=p["weight"] < 0.8, temperature=0.5, return_entropy=True)
            return token_logps(z, p["x0"], backend=backend, **options)

        agree(call, backend, [p["z"].requires_grad_()], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_of_hidden_states_in_the_place_of_their_logits(dtype, backend, device, monkeypatch):
    """In 16 bits rounding would show a number that was read after it had been written."""
    monkeypatch.setitem(op.TILE_BYTES, device.type, 3 * 4 * 5003)
    for num_states, options in ((2, {}), (61, dict(softcap=2.0)), (5003, dict(temperature=0.7))):
        p = linear_problem((2, 3), num_states, dtype, device=device)

        def call(hidden, lm_head, bias, backend, p=p, options=options):
            options = dict(options, bias=bias, return_entropy=True, backend=backend)
            return linear_token_logps(hidden, lm_head, p["x0"], **options)

        agree(
            call, backend, [p[leaf].requires_grad_() for leaf in LEAVES], dtype, slack=4 if dtype.itemsize == 4 else 8
        )


def test_rows_without_doubt_and_ids_without_probability(backend, device):
    z = torch.full((1, 3, 9), -torch.inf, device=device)
    z[..., 4] = 1.0  # certain
    z[0, 2, 6] = 1.0  # one of two
    x0 = torch.tensor([[4, 5, 6]], device=device)
    logps, entropy = token_logps(z.requires_grad_(), x0, return_entropy=True, exclude_mask=False, backend=backend)
    torch.testing.assert_close(entropy.cpu(), torch.tensor([[0, 0, 2.0]]).clamp_min(1).log())
    (grad,) = torch.autograd.grad(logps[0, 0] + logps[0, 2] + entropy.sum(), z)
    expected = torch.zeros(1, 3, 9)
    expected[0, 2, 4], expected[0, 2, 6] = -0.5, 0.5
    torch.testing.assert_close(grad.cpu(), expected)


def test_opcheck(backend, device):
    p = problem((2, 3), 7, device=device)
    weights = [p["weight"], torch.rand(2, 3, dtype=torch.float64, device=device)]
    given = (p["x0"], p["xt"], None, None, *weights, None, None, "dce", 6, True, -100, False, 0.0, "none")
    row_loss = getattr(torch.ops.fastdiff.row_loss, backend)
    torch.library.opcheck(row_loss, (p["z"].requires_grad_(), *given, False, True))
    upstream = torch.rand(2, 3, device=device)
    backward = getattr(torch.ops.fastdiff.row_loss_backward, backend)
    torch.library.opcheck(backward, (None, upstream, p["z"].detach(), *given))
