"""The row losses of the GPU backends against the reference."""

import pytest
import torch
from cases import (
    LOSSES,
    assert_near,
    large_scores,
    largest_drift,
    largest_logits,
    loss_and_grad,
    loss_of,
    problem,
    tiny_loss,
)

from fastdiff import dce_loss, dse_loss, linear_dse_loss

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# "none" runs the kernel without and with gradient; the other two are one kernel, the second with a factor.
SIZES = {"none": (2, 27, 507, 4107), "sum": (2, 507), "mean": (27, 4107)}


def both(backend, name, p, slack=1, **options):
    """Asserts that a backend's loss and gradient are the reference's."""
    got = loss_and_grad(name, p, backend=backend, **options)
    expected = loss_and_grad(name, p, backend="reference", **options)
    assert_near(got[0], expected[0], torch.float32, f"loss of {name}", slack)
    assert_near(got[1], expected[1], p["z"].dtype, f"gradient of {name}", slack)


@pytest.mark.parametrize("reduction", SIZES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_the_reference(name, dtype, reduction, backend, device):
    for num_states in SIZES[reduction]:
        both(backend, name, problem((2, 2), num_states, dtype, spread=1.0, device=device), reduction=reduction)


@pytest.mark.parametrize("name", LOSSES)
def test_large_vocabularies(name, backend, device):
    both(backend, name, problem((1, 3), 50257, mask_index=20000, device=device), slack=2, reduction="sum")


@pytest.mark.parametrize("name", ["dce", "absorb", "uniform", "uniform_logits"])
def test_a_million_states(name, backend, device):
    both(backend, name, problem((1, 2), 2**20, device=device), slack=2, reduction="sum")


@pytest.mark.parametrize("name", ["dce", "absorb", "uniform", "uniform_logits"])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1)], ids=str)
def test_rows_that_start_beyond_two_to_the_31(shape, name, backend, device):
    p, far = problem(shape, 61, torch.bfloat16, device=device), 2**30 + 8
    memory = torch.empty(2 * far + 61, dtype=torch.bfloat16, device=device)  # on the CPU only what is touched is there
    z = memory.as_strided((*shape, 61), (far, far, 1)).copy_(p["z"]).requires_grad_()
    p["xt"] = torch.full_like(p["xt"], p["mask_index"])
    results = []
    for b in (backend, "reference"):
        loss = loss_of(name, {**p, "z": z}, backend=b)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), z)[0]))
    for got, expected, dtype in zip(*results, (torch.float32, torch.bfloat16), strict=True):
        assert_near(got, expected, dtype, name)


@pytest.mark.parametrize(
    "layout", ["next position", "rows apart", "columns apart", "expanded", "four dimensions", "one dimension"]
)
def test_layouts(layout, backend, device):
    p = problem((2, 4), 61, device=device)
    if layout == "next position":
        p |= dict(z=p["z"][:, :-1], x0=p["x0"][:, 1:], xt=p["xt"][:, 1:], moved=p["moved"][:, 1:])
        p["weight"] = p["weight"][:, 1:]
    if layout == "rows apart":
        p["z"] = torch.cat([p["z"], p["z"]], -1)[..., 3:64]
    if layout == "columns apart":
        p["z"] = torch.stack([p["z"], p["z"]], -1)[..., 0]
    if layout == "expanded":
        p["z"] = p["z"][:, :1].expand(2, 4, 61)
    if layout == "four dimensions":
        p = {k: v[None].expand(2, *v.shape) if torch.is_tensor(v) else v for k, v in p.items()}
        p["sigma"] = p["sigma"][..., None]
    if layout == "one dimension":
        p = {k: v[0] if torch.is_tensor(v) else v for k, v in p.items()}
    for name in ("dce", "absorb", "uniform", "uniform_logits"):
        for reduction in ("none", "sum"):
            z = p["z"].detach().requires_grad_()
            results = []
            for b in (backend, "reference"):
                loss = loss_of(name, {**p, "z": z}, reduction=reduction, backend=b)
                results.append((loss, torch.autograd.grad(loss.sum(), z)[0]))
            for got, expected in zip(*results, strict=True):
                assert_near(got.detach(), expected.detach(), torch.float32, f"{name}, {layout}")


def test_unscored_rows_and_the_mask_are_never_read(backend, device):
    p = problem((3, 5), 61, device=device)
    unscored = p["xt"] != p["mask_index"]
    for name in ("dce", "absorb"):
        clean = loss_and_grad(name, p, reduction="sum", backend=backend)
        dirty = {**p, "z": p["z"].clone()}
        dirty["z"][unscored] = torch.nan
        dirty["z"][..., p["mask_index"]] = torch.nan
        got = loss_and_grad(name, dirty, reduction="sum", backend=backend)
        assert torch.equal(got[0], clean[0])
        assert torch.equal(got[1], clean[1])
        assert (got[1][unscored] == 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gradient_is_written_everywhere(dtype, backend, device):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for num_states in (7, 8, 1031):
            p = problem((1, 4), num_states, dtype, device=device)
            for name in ("dce", "absorb", "uniform", "uniform_logits"):
                assert not loss_and_grad(name, p, reduction="sum", backend=backend)[1].isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_non_finite_rows(value, backend, device):
    p = problem((2, 4), 9, device=device)
    p["z"][0, :, 3] = value
    for name in ("dce_all", "absorb", "uniform"):
        got, expected = (loss_of(name, p, backend=b) for b in (backend, "reference"))
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_scores_that_leave_the_type_without_their_weight(graph, in_place, reduction, backend, device):
    z, options, expected, slope = large_scores(graph, device=device)
    if in_place:
        lm_head = torch.eye(1000, device=device)
        loss = linear_dse_loss(z.requires_grad_(), lm_head, backend=backend, reduction=reduction, **options)
    else:
        loss = dse_loss(z.requires_grad_(), backend=backend, reduction=reduction, **options)
    torch.testing.assert_close(loss.cpu().sum(), expected.sum(), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(grad[:, 2:].cpu(), slope[:, None].expand(3, 998), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_logits_as_large_as_the_type(dtype, backend, device):
    z, x0 = largest_logits(dtype, device)
    results = []
    for b in (backend, "reference"):
        loss = dce_loss(z.requires_grad_(), x0, weight=0.25, exclude_mask=False, backend=b)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), z)[0]))
    torch.testing.assert_close(*results)


def test_digits_of_a_tiny_loss(backend, device):
    loss, expected = tiny_loss(backend, device)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=0)


def test_weights_and_logits_as_large_as_float32(backend, device):
    grad, expected = largest_drift(backend, device)
    assert torch.equal(grad, expected)


def test_statistics(backend, device):
    for num_states in (5, 1500):
        p = problem((3, 5), num_states, device=device)
        p["x0"] = torch.where(p["weight"] < 0.5, p["z"].argmax(-1), p["x0"])
        options = dict(mask=p["weight"] < 0.9, exclude_mask=False, return_stats=True)
        got, expected = (dce_loss(p["z"], p["x0"], backend=b, **options) for b in (backend, "reference"))
        torch.testing.assert_close(got, expected)
    ties = dce_loss(torch.zeros(1, 5, 5, device=device), torch.arange(5, device=device)[None], **_ties(backend))[1]
    assert ties.correct.tolist() == [[True, False, False, False, False]]


def _ties(backend):
    return dict(exclude_mask=False, return_stats=True, backend=backend)


def test_an_id_that_does_not_exist_gives_nan_and_reads_nothing(backend, device):
    z, x0 = torch.randn(1, 3, 9, device=device), torch.tensor([[0, 9, -1]], device=device)
    constants = ["dce", -1, False, -100, False, 0.0, "none", False, False]
    loss, _, _ = getattr(torch.ops.fastdiff.row_loss, backend)(z, x0, *[None] * 7, *constants)
    assert loss.isnan().tolist() == [[False, True, True]]


def test_upstream_gradients_and_backward_again(backend, device):
    p = problem((2, 3), 11, device=device)
    z = p["z"].requires_grad_()
    loss = loss_of("absorb", p, reduction="sum", backend=backend)
    (plain,) = torch.autograd.grad(loss, z, retain_graph=True)
    before = plain.clone()
    for factor in (2.0, 0.5):
        (scaled,) = torch.autograd.grad(loss * factor, z, retain_graph=True)
        torch.testing.assert_close(scaled, factor * before)
    assert torch.equal(plain, before)  # what was handed out is not changed
    loss = loss_of("dce", p, reduction="sum", backend=backend)
    (scaled,) = torch.autograd.grad(loss * 1024, z)
    (expected,) = torch.autograd.grad(loss_of("dce", p, reduction="sum", backend="reference") * 1024, z)
    torch.testing.assert_close(scaled, expected)


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize("unpack", [torch.clone, misaligned])
def test_backward_again_where_hooks_unpack_the_gradient_anew(unpack, backend, device):
    p = problem((2, 3), 11, device=device)
    z = p["z"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
        loss = loss_of("absorb", p, reduction="sum", backend=backend)
    (expected,) = torch.autograd.grad(loss_of("absorb", p, reduction="sum", backend="reference"), z)
    for factor in (2.0, 0.5):
        (scaled,) = torch.autograd.grad(loss * factor, z, retain_graph=True)
        torch.testing.assert_close(scaled, factor * expected)


def test_double_backward_is_an_error(backend, device):
    p = problem((2, 3), 11, device=device)
    z = p["z"].requires_grad_()
    for reduction in ("none", "sum"):
        loss = loss_of("dce", p, reduction=reduction, backend=backend)
        (grad,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss.sum() + grad.square().sum(), z)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_whole(reduction, backend, device):
    p = problem((2, 3), 11, device=device)

    def step(z):
        return loss_of("uniform", {**p, "z": z * 2}, reduction=reduction, backend=backend).sum() * 3

    z = p["z"].requires_grad_()
    eager = torch.autograd.grad(step(z), z)[0]
    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(z), z)[0]
    torch.testing.assert_close(compiled, eager)


def test_opcheck(backend, device):
    p = problem((2, 3), 7, device=device)
    rows = [p["x0"], p["xt"], None, None, p["weight"], None, None, None]
    constants = ["dce", p["mask_index"], True, -100, False, 1e-3, "mean"]
    z = p["z"].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.fastdiff.row_loss, backend), (z, *rows, *constants, True, True))
    upstream = torch.rand((), device=device)
    torch.library.opcheck(
        getattr(torch.ops.fastdiff.row_loss_backward, backend), (upstream, None, z.detach(), *rows, *constants)
    )
    torch.library.opcheck(getattr(torch.ops.fastdiff.scale_grad_, backend), (z.detach().clone(), upstream))


def test_runs_repeat_and_a_row_does_not_depend_on_its_batch(backend, device):
    p = problem((3, 3), 300, device=device)
    part = {k: v[2:3] if torch.is_tensor(v) else v for k, v in p.items()}
    for name in LOSSES:
        loss = loss_of(name, p, backend=backend)
        assert torch.equal(loss, loss_of(name, p, backend=backend))
        assert torch.equal(loss_of(name, part, backend=backend), loss[2:3])


def test_float64_falls_back_to_the_reference_and_empty_batches_work(backend, device):
    p = problem((2, 3), 11, torch.float64, device=device)
    assert torch.equal(loss_of("dce", p, backend=backend), loss_of("dce", p, backend="reference"))
    for shape in ((0, 3), (2, 0)):
        empty = problem(shape, 11, device=device)
        assert loss_of("dce", empty, backend=backend).shape == shape
        assert loss_of("absorb", empty, reduction="mean", backend=backend) == 0


def test_bad_values_are_errors_where_they_are_checked(backend, device, monkeypatch):
    monkeypatch.setattr("fastdiff.checks.CHECKED", True)
    z, x0 = torch.zeros(1, 2, 9, device=device), torch.tensor([[0, 9]], device=device)
    with pytest.raises(ValueError, match=r"x0: expected ids in \[0, 9\), got 9 at \[0, 1\]"):
        dce_loss(z, x0, backend=backend)
    with pytest.raises(ValueError, match="sigma: expected numbers > 0"):
        dse_loss(z, 0.0, torch.full_like(x0, 8), torch.zeros_like(x0), backend=backend)
