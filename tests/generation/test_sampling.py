"""What all samplers keep to."""

from types import SimpleNamespace

import pytest
import torch
from laws import agrees
from networks import RandomNetwork, random_tokens
from samplers import RANKED, SAMPLERS, TIMED, P, UniformProduct, independent, product, product_scores
from torch import nn

from fastdiff import Generated
from fastdiff.generation.sampling import sample
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.graphs import Uniform
from fastdiff.schedules import Geometric, LogLinear


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_sees_only_what_changes(sampler):
    network = RandomNetwork(6)
    infill = random_tokens(10, 6).masked_fill(torch.arange(60).view(10, 6) % 7 < 4, -1)
    steps = None if sampler == "first_hitting" else 40
    options = dict(num_samples=10, infill=infill, steps=steps, mask_index=4, sampler=sampler)
    result = sample(network, return_trajectory=True, **options)
    assert isinstance(result, Generated)
    changed = (result.trajectory[1:] != result.trajectory[:-1]).any(2)
    assert result.num_forwards == sum(map(len, network.asked)) == changed.sum()
    assert min(map(len, network.asked)) > 0
    seen = torch.cat([frame[rows] for frame, rows in zip(result.trajectory, changed, strict=False)])
    assert torch.equal(torch.cat(network.asked), seen)
    if sampler == "first_hitting":
        assert len(result.trajectory) == 1 + (infill < 0).sum(1).max()
        assert result.num_forwards == (infill < 0).sum()


def test_scores_are_asked_of_sequences_with_masks():
    seen = []

    def network(xt, sigma):
        seen.append((xt, sigma))
        return product_scores(xt, sigma)

    options = dict(length=3, steps=6, mask_index=4, parametrization="scale_by_sigma", return_trajectory=True)
    result = sample(network, num_samples=20, **options)
    masked = (result.trajectory[:-1] == 4).any(2)
    assert result.num_forwards == masked.sum()
    assert [len(xt) for xt, _ in seen] == masked.sum(1).tolist()
    assert all(sigma.shape == (len(xt),) and sigma.dtype == torch.float32 for xt, sigma in seen)
    expected = LogLinear().total_noise(torch.linspace(1, 0, 7, dtype=torch.float64))[:-1]
    torch.testing.assert_close(torch.stack([sigma[0] for _, sigma in seen]), expected[: len(seen)].float())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectory(sampler):
    prompt = torch.tensor([2, 0])
    options = dict(num_samples=6, length=7, mask_index=4, sampler=sampler, prompt=prompt)
    result = sample(RandomNetwork(7), return_trajectory=True, **options)
    frames = result.trajectory
    assert torch.equal(frames[0], torch.tensor([2, 0, 4, 4, 4, 4, 4]).expand(6, 7))
    assert torch.equal(frames[-1], result.tokens)
    assert (frames[-1] < 4).all()
    assert ((frames[1:] == frames[:-1]) | (frames[:-1] == 4)).all()
    assert (frames[:-1] == 4).flatten(1).any(1).all()  # it stops when nothing is masked
    assert torch.equal(sample(RandomNetwork(7), **options), result.tokens)


@pytest.mark.parametrize("sampler", RANKED)
def test_of_equally_sure_tokens_the_first_is_revealed(sampler):
    options = dict(length=70, steps=10, mask_index=4, sampler=sampler, return_trajectory=True)
    result = sample(lambda xt: torch.zeros(*xt.shape, 5), **options)
    position = torch.arange(70)
    assert all(((frame[0] < 4) == (position < 7 * i)).all() for i, frame in enumerate(result.trajectory))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sequence_does_not_depend_on_those_beside_it(sampler):
    network = RandomNetwork(6)
    infill = random_tokens(12, 6).masked_fill(torch.arange(72).view(12, 6) % 7 < 4, 4)
    options = dict(mask_index=4, sampler=sampler, block_length=3 if sampler in [*RANKED, "random"] else None)
    x = sample(network, num_samples=12, infill=infill, seed=1, **options)
    for n in (1, 5):
        assert torch.equal(x[:n], sample(network, num_samples=n, infill=infill[:n], seed=1, **options))
    assert not torch.equal(x, sample(network, num_samples=12, infill=infill, seed=2, **options))
    x = sample(network, num_samples=40, length=6, mask_index=4, sampler=sampler)
    assert len(x.unique(dim=0)) > 5


@pytest.mark.parametrize("options", [dict(mask_index=4), dict(graph=Uniform(4))])
def test_scores_are_asked_without_those_that_are_done(options):
    network = product_scores if "mask_index" in options else UniformProduct()
    options |= dict(num_samples=6, steps=3, parametrization="scale_by_sigma")
    infill = torch.full((6, 3), -1)
    x = sample(network, infill=infill, **options)
    infill[:2] = 1
    assert torch.equal(sample(network, infill=infill, **options)[2:], x[2:])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prompt", [torch.tensor([3, 3]), torch.arange(6).view(3, 2) % 4])
def test_prompt_is_kept(prompt, sampler):
    network = RandomNetwork(3)
    x = sample(network, num_samples=3, length=3, mask_index=4, prompt=prompt, sampler=sampler)
    assert torch.equal(x[:, :2], prompt.expand(3, 2))
    assert all((xt[:, :2] < 4).all() for xt in network.asked)
    infill = nn.functional.pad(prompt, (0, 1), value=-1)
    assert torch.equal(x, sample(network, num_samples=3, infill=infill, mask_index=4, sampler=sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_to_draw(sampler):
    full = torch.tensor([[0, 1, 2], [2, 1, 0]])
    for given in (dict(prompt=full, length=3), dict(infill=full)):
        result = sample(None, num_samples=2, mask_index=4, sampler=sampler, return_trajectory=True, **given)
        assert torch.equal(result.tokens, full)
        assert torch.equal(result.trajectory, full.unsqueeze(0))
        assert result.num_forwards == 0


@pytest.mark.parametrize("sampler", TIMED)
def test_the_uniform_graph_keeps_what_is_given(sampler):
    infill = torch.tensor([[0, -1, -1], [-1, 3, 2], [0, 3, 1]])
    options = dict(num_samples=3, steps=4, sampler=sampler, parametrization="scale_by_sigma", return_trajectory=True)
    result = sample(UniformProduct(), infill=infill, graph="uniform", **options)
    assert ((result.trajectory == infill) | (infill < 0)).all()
    assert result.tokens.max() < 4
    assert result.num_forwards == 2 * 4  # the third has nothing to draw
    named = sample(UniformProduct().__call__, infill=infill, graph=Uniform(4), **options)
    assert torch.equal(named.trajectory, result.trajectory)
    prompt = sample(UniformProduct(), prompt=torch.tensor([1]), length=3, graph="uniform", **options)
    assert (prompt.trajectory[:, :, 0] == 1).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sampler", ["tweedie", "first_hitting", "confidence"])
def test_a_body_and_a_last_layer(sampler, bias):
    """The same tokens, with no logits where nothing is drawn: those hidden states are NaN."""
    network, head = RandomNetwork(6), nn.Linear(5, 5, bias=bias).double().requires_grad_(False)

    def body(xt):
        return SimpleNamespace(last_hidden_state=network(xt).masked_fill((xt != 4).unsqueeze(-1), torch.nan))

    options = dict(num_samples=20, length=6, mask_index=4, sampler=sampler)
    expected = sample(lambda xt: SimpleNamespace(logits=head(network(xt))), **options)
    for last in (head, head.weight) if not bias else (head,):
        assert torch.equal(sample((body, last), **options), expected)


class Dropping(nn.Module):
    """Logits through dropout, and whether gradients were on."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.frozen = nn.Embedding(5, 5), nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.had_grad = []

    def forward(self, xt, sigma=None):
        logits = self.frozen(self.drop(self.embed(xt)))
        self.had_grad.append(logits.requires_grad)
        return logits


@pytest.mark.parametrize("parametrization", ["logits", "log_score"])
def test_modules_are_evaluated_without_gradients_and_get_their_modes_back(parametrization):
    model, options = Dropping(), dict(length=9, steps=3, mask_index=4, parametrization=parametrization)
    assert torch.equal(sample(model, num_samples=9, **options), sample(model, num_samples=9, **options))
    assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)
    assert model.had_grad
    assert not any(model.had_grad)
    assert torch.is_grad_enabled()


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    sample(product, length=3, mask_index=4)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes anything for a terminal
    sample(product, length=3, mask_index=4)
    shown = capsys.readouterr()
    assert "steps" in shown.err
    assert "100%" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("loss", ["time-free", "absorb", "uniform"])
def test_transformer(loss):
    graph = "uniform" if loss == "uniform" else "absorb"
    conditioned = loss != "time-free"
    model = DiffusionTransformer(ModelConfig(5, 6, 16, 1, 2, 8 * conditioned))
    options = dict(num_samples=9, length=6, steps=3, graph=graph, prompt=torch.tensor([1]))
    x = sample(model, parametrization="scale_by_sigma" if conditioned else "logits", **options)
    assert x.shape == (9, 6)
    assert x.max() == (4 if graph == "uniform" else 3)  # id 4 is a token there, and the mask here
    if loss == "time-free":
        assert torch.equal(x, sample((model.body, model.lm_head), mask_index=4, **options))


@pytest.mark.parametrize("sampler", TIMED)
def test_conditionals_in_the_uniform_graph(sampler):
    """Independent tokens are drawn from them where noise has left nothing."""

    def network(xt, sigma):
        return P.log().expand(len(xt), -1, -1)

    x = sample(network, num_samples=3000, length=3, steps=1, graph=Uniform(4), sampler=sampler, schedule=Geometric())
    assert agrees(x, independent(P), 4)
