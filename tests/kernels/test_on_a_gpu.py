"""What only a GPU can show: captured graphs, streams, other devices, mixed precision, and that nothing waits for it."""

import pytest
import torch
from cases import LOSSES, assert_near, linear_problem, loss_and_grad, loss_and_grads, loss_of, problem

from fastdiff import Uniform, corrupt, dce_loss, harmonic_mask, mask_exactly, mask_tokens, sample_tokens
from fastdiff.backends import EMULATING, INTERPRETING

if not torch.cuda.is_available() or INTERPRETING or EMULATING:
    pytest.skip("needs a GPU", allow_module_level=True)

M = 1030


@pytest.fixture(autouse=True)
def default(backend, monkeypatch):
    monkeypatch.setattr("fastdiff.backends.DEFAULT", backend)


def inputs(device="cuda"):
    p = problem((4, 64), M + 1, torch.bfloat16, device=device)
    return torch.zeros((), dtype=torch.long, device=device), p["x0"], p["z"].requires_grad_()


def masks_and_loss(seed, x0, z):
    xt, _ = mask_tokens(x0, 0.5, mask_index=M, seed=seed)
    return xt, dce_loss(z, x0, xt=xt, mask_index=M, reduction="sum") * 3


def step(seed, x0, z, forward=masks_and_loss):
    xt, loss = forward(seed, x0, z)
    return xt, loss.detach(), torch.autograd.grad(loss, z)[0]


def test_a_captured_step_follows_its_seed():
    seed, x0, z = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(seed, x0, z)  # compiles the kernels, which a capture does not allow
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(seed, x0, z)
    replays = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        replays.append([t.clone() for t in captured])
        assert all(map(torch.equal, replays[-1], step(seed, x0, z)))
    assert not any(map(torch.equal, *replays))


def test_a_side_stream():
    seed, x0, z = inputs()
    expected = step(seed + 1, x0, z)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**8)  # what ran on another stream would not wait for the seed
        seed.fill_(1)
        got = step(seed, x0, z)
    side.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    for got, expected in zip(step(*inputs("cuda:1")), step(*inputs("cuda:0")), strict=True):
        assert got.device == torch.device("cuda:1")
        torch.testing.assert_close(got.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


def test_tensors_on_two_devices():
    _, x0, z = inputs()
    with pytest.raises(ValueError, match="x0: expected a tensor on cuda:0, got cpu"):
        dce_loss(z, x0.cpu())
    with pytest.raises(ValueError, match="weight: expected a tensor on cuda:0, got cpu"):
        dce_loss(z, x0, weight=torch.ones(4))


def test_compiles_to_cuda_graphs():
    seed, x0, z = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(masks_and_loss, mode="reduce-overhead", fullgraph=True)
    for value in range(4):  # the first calls warm up and record
        seed.fill_(value)
        torch.compiler.cudagraph_mark_step_begin()
        for got, expected in zip(step(seed, x0, z, compiled), step(seed, x0, z), strict=True):
            torch.testing.assert_close(got, expected)


def test_autocast():
    p, layer = problem((4, 64), M + 1, device="cuda"), torch.nn.Linear(32, M + 1, device="cuda")
    hidden, results = torch.randn(4, 64, 32, device="cuda"), []
    for backend in (None, "reference"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = layer(hidden)
            loss = loss_of("dce", {**p, "z": z}, reduction="mean", backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (z, layer.weight))))
    (loss, grad_z, grad), (expected, expected_z, expected_grad) = results
    assert_near(loss, expected, torch.float32, "loss")
    assert_near(grad_z, expected_z, torch.bfloat16, "gradient of the logits")
    assert grad.dtype == torch.float32
    # A product of gradients that differ by a unit in the last place, itself rounded to bfloat16.
    assert_near(grad, expected_grad, torch.bfloat16, "gradient of the layer", slack=2)


def test_scaled_gradients():
    p, scaler = problem((4, 64), M + 1, torch.float16, device="cuda"), torch.amp.GradScaler("cuda", init_scale=1024.0)
    z = p["z"].requires_grad_()
    grads = []
    for backend in (None, "reference"):
        loss = scaler.scale(loss_of("dce", p, reduction="mean", backend=backend))
        grads += torch.autograd.grad(loss, z)
    assert_near(*grads, torch.float16, "scaled gradient")


def test_nothing_waits_for_the_device(monkeypatch):
    monkeypatch.setattr("fastdiff.checks.CHECKED", False)
    p = problem((4, 64), M + 1, device="cuda")
    q = linear_problem((4, 64), M + 1, device="cuda")
    x0, counts = p["x0"], torch.full((4,), 5, device="cuda")

    def everything():
        mask_tokens(x0, 0.5, mask_index=M, seed=1)
        mask_exactly(x0, counts, mask_index=M, seed=1)
        harmonic_mask(x0, mask_index=M, seed=1)
        corrupt(x0, p["sigma"], Uniform(M + 1), seed=1)
        sample_tokens(p["z"], p["xt"], seed=1)
        for name in LOSSES:
            for reduction in ("none", "mean"):
                loss_and_grad(name, p, reduction=reduction)
                loss_and_grads(name, q, "hidden", "lm_head", reduction=reduction, capacity=x0.numel())

    everything()  # compiles, and copies the table of harmonic numbers
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
