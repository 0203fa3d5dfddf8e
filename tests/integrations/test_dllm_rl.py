"""dLLM-RL: the losses of its scripts, with log-probabilities of masked tokens alone."""

import pytest
import torch
from rows import largest_rows
from standins import Network, problem
from standins import dllm_rl as standin

from fastdiff.integrations.dllm_rl import masked_logps

B, L, V, START = 3, 12, 33, 4
SCRIPTS = dict(llada=standin.llada, dream=standin.dream, sdar=standin.sdar)
OPTIONS = dict(llada={}, dream=dict(shift=True), sdar=dict(start_pos=START))


@pytest.fixture
def p():
    return problem(B, L, V)


@pytest.fixture
def network(p):
    torch.manual_seed(1)
    return Network(p, 4, bias=True, dtype=torch.float64)


def arguments(p, script):
    """xt, labels, mask, advantages, old log-probabilities."""
    mask = p.xt == p.mask_index
    mask[:, :START], mask[:, START] = False, True
    labels = p.x0 if script == "sdar" else p.x0.where(mask, 1 if script == "dream" else -100)
    old = torch.randn(p.x0[:, script == "dream" :].shape, dtype=torch.float64) - 3
    xt = torch.cat([p.x0, p.xt[:, START:]], 1) if script == "sdar" else p.xt
    return xt, labels, mask, (1.0, -0.5, 2.0), old


def gradients(loss, network):
    return loss.detach(), torch.autograd.grad(loss, [*network.parameters()])


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_the_published_ones(script, p, network):
    given, more = arguments(p, script), dict(start_pos=START) if script == "sdar" else {}
    theirs = gradients(SCRIPTS[script](network, *given, **more), network)
    ours = gradients(standin.ours(network, *given, **OPTIONS[script]), network)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("script", "like"), dict(llada="llada", mmada="llada", dream="dream", sdar="sdar", trado="sdar").items()
)
def test_stand_ins_are_the_scripts(script, like, p, network):
    """Where there is a checkout of them."""
    xt, labels, mask, adv, old = arguments(p, like)
    known = dict(model=lambda xt, **_: network(xt), start_pos=START, pad_id=0)
    known |= dict(make_attention_mask=lambda *_: None, process_pad=lambda *_: None)
    known |= dict(basic_block_attention=torch.zeros(1))
    if (forward_process := standin.real(script, **known)) is None:
        pytest.skip("no checkout of dLLM-RL in FASTDIFF_CHECKOUTS")
    if like == "sdar":
        known["model"] = lambda input_ids, **_: network(input_ids)
        given = (xt, mask, None, labels, adv, old)
        forward_process = standin.real(script, **known)
    else:
        given = (xt, labels, mask, *([START] if like == "dream" else []), adv, old)
    theirs = gradients(forward_process(*given), network)
    ours = gradients(standin.ours(network, xt, labels, mask, adv, old, **OPTIONS[like]), network)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_masked_rows_are_multiplied(script):
    p = problem(B, L, 1031)
    network = Network(p, 4, dtype=torch.float64)
    xt, labels, mask, *_ = arguments(p, script)
    labels = labels.where(mask, 0)

    def step():
        masked_logps(network, labels, mask, input_ids=xt, **OPTIONS[script]).sum().backward()

    assert largest_rows(step, 1031)[1] <= mask.sum() + 1


def test_errors_name_the_argument(p, network):
    xt, labels, mask, *_ = arguments(p, "llada")
    with pytest.raises(ValueError, match="p_mask: expected a masked token in each sequence"):
        masked_logps(network, labels, mask & (torch.arange(B) > 0)[:, None], input_ids=xt)
    with pytest.raises(TypeError, match="p_mask: expected a bool tensor"):
        masked_logps(network, labels, mask.long(), input_ids=xt)
    with torch.no_grad():
        network.lm_head.bias[labels[mask][0]] = -torch.inf
    with pytest.raises(ValueError, match="finite log-probabilities, got -inf"):
        masked_logps(network, labels, mask, input_ids=xt)
