"""LossHead against the losses of the model's own logits, in plain PyTorch: values, and gradients of all parameters."""

from pathlib import Path

import pytest
import torch
import torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_heads import (
    MASK,
    PLAIN,
    REDUCTIONS,
    B,
    L,
    Scaled,
    V,
    agree,
    batch,
    low,
    near,
    ours,
    published,
    scaled_and_capped,
    with_layer,
)

from fastdiff import dce_loss


def lowered(z):
    return torch.where(torch.arange(V) == MASK, z - 1e6, z)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("tail", PLAIN)
def test_what_is_behind_the_layer(tail, layer):
    *_, options = batch()
    for reduction in REDUCTIONS:
        for bias in (False, True):
            agree(with_layer(layer, tail=tail, bias=bias), **options, **reduction, exclude_mask=False)
        agree(with_layer(layer, tail=tail), **options, **reduction, mask_index=MASK)


@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
def test_ids_that_the_model_leaves_out(layer):
    """One id, wherever it is, or the last: the loss does without them, whatever it says of the mask."""
    xt, x0, options = batch()
    last = range(MASK + 1, V)
    for reduction in REDUCTIONS:
        for tail in (low(MASK), lowered, low(*last), low(MASK, *last), low(MASK + 1, *last)):
            model = with_layer(layer, tail=tail)
            agree(model, **options, **reduction, mask_index=MASK)
            agree(model, **options, **reduction, exclude_mask=False)
            agree(model, xt=xt, weight=options["weight"], mask_index=MASK, **reduction)
            agree(model, xt=xt, mask_index=MASK, exclude_mask=False, **reduction)
        for first in range(3):
            other = torch.where(x0 == first, 5, x0)
            agree(with_layer(layer, tail=low(first)), other, **options, **reduction, exclude_mask=False)
            agree(with_layer(layer, tail=low(first)), other, **options, **reduction, mask_index=first)
        agree(with_layer(layer, tail=low(*last)), **options, **reduction)  # the mask is the last of them
        agree(with_layer(layer, tail=low(V - 1)), **options, **reduction)
        agree(with_layer(layer, tail=low(MASK)), sigma=0.7, xt=xt, mask_index=MASK, **reduction)


@pytest.mark.usefixtures("small_parts")
@settings(deadline=None, max_examples=60)
@given(
    parts=st.booleans(),
    tail=st.sampled_from(PLAIN[:5]),
    tokens=st.sampled_from(["xt", "mask", "all"]),
    weight=st.sampled_from([None, 2.5, "[B]", "[B, 1]", "[1, L]", "[B, L]"]),
    options=st.fixed_dictionaries(dict(exclude_mask=st.booleans(), z_loss=st.sampled_from([0.0, 0.1]))),
    ignored=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_options_of_cross_entropy(parts, tail, tokens, weight, options, ignored, reduction):
    xt, x0, known = batch()
    shape = dict(zip(("[B]", "[B, 1]", "[1, L]", "[B, L]"), ((B,), (B, 1), (1, L), (B, L)), strict=True)).get(weight)
    options = options | reduction | dict(mask_index=MASK)
    options["weight"] = weight if shape is None else torch.rand(shape, dtype=torch.float64)
    options |= dict(xt=xt) if tokens == "xt" else dict(mask=known["mask"]) if tokens == "mask" else {}
    if ignored:
        x0 = torch.where(torch.rand(B, L) < 0.3, -100, x0)
    agree(with_layer(Scaled if parts else lambda linear: linear, tail=tail), x0, **options)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("parametrization", ["log_score", "logits", "scale_by_sigma"])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_score_entropy(graph, parametrization):
    xt, x0, known = batch()
    xt = xt if graph == "absorb" else torch.where(known["mask"], (x0 + 3) % V, x0)
    sigma = torch.rand(B, dtype=torch.float64) + 0.1
    options = dict(sigma=sigma, xt=xt, graph=graph, parametrization=parametrization, dsigma=known["weight"])
    for reduction in REDUCTIONS:
        for layer in (lambda linear: linear, Scaled):
            agree(with_layer(layer, tail=scaled_and_capped), **options, **reduction, mask_index=MASK)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("tail", [scaled_and_capped, low(MASK)])
def test_statistics(tail, layer):
    xt, x0, options = batch()
    model = with_layer(layer, tail=tail)
    expected = dce_loss(model(xt).logits, x0, **options, mask_index=MASK, return_stats=True)
    for reduction in REDUCTIONS:
        loss, stats = ours(model, x0, **options, **reduction, mask_index=MASK, return_stats=True)
        near([loss], [published(model, x0, **options, **reduction, mask_index=MASK)])
        near(stats[:2] + stats[3:], expected[1][:2] + expected[1][3:])
        assert torch.equal(stats.correct, expected[1].correct)
        assert not any(one.requires_grad for one in stats)


@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_score(layer, reduction):
    xt, x0, known = batch()
    model = with_layer(layer)
    agree(model, mask=torch.zeros_like(known["mask"]), **reduction)
    agree(model, torch.full_like(x0, -100), **reduction)
    agree(model, x0[:0], given=xt[:0], **reduction)
    agree(model, x0[:, :0], given=xt[:, :0], **reduction)


def test_ranks():
    functions = (
        "ddp",
        "fsdp2",
        "fsdp2_with_the_head_by_itself",
        "fsdp2_with_a_part_of_the_head_by_itself",
        "hsdp",
        "fsdp1",
        "tensor_parallel",
        "fsdp2_and_tensor_parallel",
    )
    torchrun.launch(Path(__file__).with_name("loss_head_ranks.py"), 2, *functions)
