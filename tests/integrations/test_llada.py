"""LLaDA's losses where the shared test does not look, its likelihood and its sampler."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from rows import largest_rows
from standins import Network as LastLayer
from standins import llada as standin
from standins import problem

from fastdiff.integrations import llada

V, MASK = 126464, 126336


class Network:
    """Conditionals that no distribution has, from the visible tokens that the attention mask leaves in."""

    device = torch.device("cpu")

    def __init__(self, num_states=V, mask_id=MASK):
        g = torch.Generator().manual_seed(5)
        self.embed, self.place = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (num_states, 64))
        self.head = torch.randn(8, num_states, generator=g, dtype=torch.float64)
        if num_states == V:  # each the likeliest at some positions
            self.head[:, [llada.EOS, llada.EOT]] = 6 * torch.tanh(self.place[[6, 8]].T)
        self.mask_id, self.rows = mask_id, []

    def __call__(self, xt, attention_mask=None):
        self.rows.append(len(xt))
        seen = torch.ones_like(xt) if attention_mask is None else attention_mask
        order = torch.linspace(1, 2, xt.shape[1], dtype=torch.float64)
        state = torch.einsum("bld,bl->bd", self.embed[xt], seen * order).unsqueeze(1)
        return SimpleNamespace(logits=torch.tanh(state / 4 + self.place[: xt.shape[1]]) @ self.head)


LOSSES = {"pretraining_loss": (), "sft_loss": (torch.full((2, 3), 3),)}  # and what of an answer they are told


def last_layer(shape=(2, 3), num_states=9, width=4, dtype=torch.float64):
    torch.manual_seed(1)
    return LastLayer(problem(*shape, num_states), width, dtype=dtype)


def loss_and_grads(module, name, network, *arguments):
    loss = getattr(module, name)(network, *arguments)
    return loss.detach(), torch.autograd.grad(loss, tuple(network.parameters()))


def batch(mask, shape=(2, 3), num_states=9):
    """Noised and clean tokens, the mask and p_mask."""
    x0 = torch.arange(mask.numel()).view(shape) % (num_states - 1)
    return torch.where(mask, num_states - 1, x0), x0, mask, torch.full(shape, 0.25)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_losses_where_nothing_or_everything_is_masked(name, masked):
    network, arguments = last_layer(), (*batch(torch.full((2, 3), masked)), *LOSSES[name])
    ours, theirs = (loss_and_grads(module, name, network, *arguments) for module in (llada, standin))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert (ours[0] != 0) == masked


def test_a_sequence_without_an_answer_counts_for_nothing():
    mask, lengths = torch.tensor([[False] * 3, [True] * 3]), torch.tensor([[0], [3]]).expand(2, 3)
    network, arguments = last_layer(), (*batch(mask), lengths)
    ours, theirs = (loss_and_grads(module, "sft_loss", network, *arguments) for module in (llada, standin))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert ours[0] != 0


def test_losses_in_bfloat16_are_not_rounded():
    network, shape = last_layer((4, 8), 1000, 1, torch.bfloat16), (4, 8)
    with torch.no_grad():
        network.hidden.fill_(1)  # so that logits are the weights, and not rounded either
    arguments = batch(torch.ones(shape, dtype=torch.bool), shape, 1000)
    loss = llada.pretraining_loss(network, *arguments)
    exact = standin.pretraining_loss(network.double(), *arguments)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_that_the_model_scales_in_place(name):
    """As LLaDA's does with scale_logits."""
    network, arguments = last_layer(), (*batch(torch.tensor([[True, True, False], [True] * 3])), *LOSSES[name])
    network.register_forward_hook(lambda model, inputs, outputs: SimpleNamespace(logits=outputs.logits.mul_(0.25)))
    ours, theirs = (loss_and_grads(module, name, network, *arguments) for module in (llada, standin))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_training_makes_logits_of_masked_tokens_only(name):
    mask = torch.tensor([[True, True, False], [True] * 3])
    network, arguments = last_layer(num_states=1031, width=2), (*batch(mask, num_states=1031), *LOSSES[name])
    steps = (lambda of=module: getattr(of, name)(network, *arguments).backward() for module in (llada, standin))
    (_, ours), (_, theirs) = (largest_rows(step, 1031) for step in steps)
    assert (ours, theirs) == (5, 6)


def likelihood_by_enumeration(network, prompt, answer, cfg_scale):
    """-sum over subsets S of the answer of (their weight 1 / (m C(A, m))) times the losses in S."""
    total, length = 0.0, len(answer)
    x0, given = torch.cat([prompt, answer]), torch.arange(len(prompt) + length) < len(prompt)
    for bits in itertools.product([False, True], repeat=length):
        count = sum(bits)
        if not count:
            continue
        where = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), torch.tensor(bits)])
        xt = x0.masked_fill(where, network.mask_id)[None]
        logits = network(xt).logits[0]
        if cfg_scale:
            blank = network(xt.masked_fill(given, network.mask_id)).logits[0]
            logits = blank + (cfg_scale + 1) * (logits - blank)
        losses = -logits.log_softmax(-1).gather(-1, x0[:, None]).squeeze(-1)[where]
        total += losses.sum().item() / (count * len(list(itertools.combinations(range(length), count))))
    return -total


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_likelihood_of_a_short_answer_is_exact(cfg_scale):
    network = Network(num_states=12, mask_id=7)
    prompt, answer = torch.tensor([1, 2, 3]), torch.tensor([4, 0, 9])
    ours = llada.get_log_likelihood(network, prompt, answer, mc_num=7, cfg_scale=cfg_scale, mask_id=7)
    assert ours == pytest.approx(likelihood_by_enumeration(network, prompt, answer, cfg_scale), abs=1e-6)
    one = [
        f(network, prompt, answer[:1], 1, 1, cfg_scale, 7)
        for f in (llada.get_log_likelihood, standin.get_log_likelihood)
    ]
    assert one[0] == pytest.approx(one[1], abs=1e-6)  # one token, as for multiple choice


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_likelihood_is_the_published_one_in_the_mean(cfg_scale):
    network = Network(num_states=12, mask_id=7)
    prompt, answer = torch.tensor([1, 2]), torch.tensor([4, 0, 9, 5, 11, 3])
    torch.manual_seed(0)

    def repeat(function, times, *arguments):
        values = torch.tensor([function(network, prompt, answer, *arguments, cfg_scale, 7) for _ in range(times)])
        return values.mean(), values.std() / times**0.5

    (ours, error), (theirs, their_error) = (
        repeat(llada.get_log_likelihood, 20, 25, 5),
        repeat(standin.get_log_likelihood, 200, 6, 6),
    )
    assert error > 0
    assert abs(ours - theirs) < 4 * (error**2 + their_error**2).sqrt()


def test_likelihood_spends_mc_num_passes_in_batches_and_says_so_if_they_are_too_few():
    network = Network(num_states=12, mask_id=7)
    prompt, answer = torch.tensor([1, 2]), torch.tensor([4, 0, 9, 5, 11, 3])
    llada.get_log_likelihood(network, prompt, answer, 25, 5, mask_id=7)
    assert sum(network.rows) <= 25
    assert max(network.rows) == 5
    assert llada.get_log_likelihood(network, prompt[:0], answer[:1], 1, mask_id=7) < 0
    with pytest.raises(ValueError, match="num_samples"):
        llada.get_log_likelihood(network, prompt, answer, 2, mask_id=7)


def generated(function, network, prompt, **options):
    return function(network, prompt, **dict(steps=4, gen_length=8, block_length=4) | options)


PROMPT, LEFT_PADDED = torch.tensor([[5, 6, 7], [9, 8, 120000]]), torch.tensor([[0, 0, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(steps=2),
        dict(steps=16),  # more than there are masks
        dict(steps=6, block_length=8),
        dict(attention_mask=LEFT_PADDED),
        dict(attention_mask=LEFT_PADDED, cfg_scale=1.5),
        dict(logits_eos_inf=True),
        dict(confidence_eos_eot_inf=True),
        dict(confidence_eos_eot_inf=True, logits_eos_inf=True),
    ],
    ids=str,
)
def test_generates_the_published_tokens(options):
    network = Network()
    ours, theirs = (generated(f, network, PROMPT, **options) for f in (llada.generate, standin.generate))
    assert torch.equal(ours, theirs)
    assert (ours != MASK).all()
    without = {name: value for name, value in options.items() if value is not True}
    assert (without == options) == torch.equal(ours, generated(llada.generate, network, PROMPT, **without))


def test_confidence_is_that_among_tokens_other_than_the_ends():
    z = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[0, :, llada.EOS], z[1, 0, llada.EOT], z[..., 5] = 12.0, 40.0, 9.0
    x0 = torch.tensor([[5, llada.EOS, 5], [5, llada.EOT, 6]])
    probability = z.softmax(-1).gather(-1, x0[..., None]).squeeze(-1).float()
    got = llada._without_ends(z, x0, probability)
    z[..., [llada.EOS, llada.EOT]] = -torch.inf
    expected = z.softmax(-1).gather(-1, x0[..., None]).squeeze(-1).float()
    assert (got <= 1).all()
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(got[1, 1:], expected[1, 1:], rtol=1e-4, atol=0)


def test_guides_without_an_attention_mask():
    network, ones = Network(num_states=12, mask_id=7), torch.ones_like(PROMPT)
    options = dict(cfg_scale=1.5, mask_id=7)
    expected = generated(standin.generate, network, PROMPT % 7, attention_mask=ones, **options)
    assert torch.equal(generated(llada.generate, network, PROMPT % 7, **options), expected)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_generates_from_the_tempered_law(remasking):
    network = Network(num_states=12, mask_id=7)
    prompt = torch.tensor([[1, 2]]).expand(6000, -1)
    torch.manual_seed(0)
    options = dict(steps=1, gen_length=1, block_length=1, temperature=0.5, remasking=remasking, mask_id=7)
    drawn = llada.generate(network, prompt, **options)
    expected = 6000 * (network(torch.tensor([[1, 2, 7]])).logits[0, -1] / 0.5).softmax(-1)
    seen = torch.bincount(drawn[:, -1], minlength=12)
    common = expected > 5
    assert common.sum() > 2
    assert ((seen - expected)[common] ** 2 / expected[common]).sum() < 4 * common.sum() + 10


def test_seeds_name_what_is_generated():
    network = Network(num_states=12, mask_id=7)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generated(llada.generate, network, PROMPT % 7, temperature=1.0, remasking="random", mask_id=7))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_errors_name_the_argument():
    network = Network(num_states=12, mask_id=7)
    for name, options in (
        ("block_length", dict(block_length=3)),
        ("steps", dict(steps=3)),
        ("remasking", dict(remasking="no")),
    ):
        with pytest.raises(ValueError, match=name):
            generated(llada.generate, network, PROMPT % 7, mask_id=7, **options)
    last, (xt, x0, mask, p_mask) = last_layer(), batch(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask"):
        llada.pretraining_loss(last, xt, x0, mask.long(), p_mask)
    with pytest.raises(ValueError, match="x0"):
        llada.pretraining_loss(last, xt, x0[:, :2], mask, p_mask)
    with pytest.raises(TypeError, match="get_output_embeddings"):
        llada.pretraining_loss(torch.nn.Linear(2, 2), xt, x0, mask, p_mask)
