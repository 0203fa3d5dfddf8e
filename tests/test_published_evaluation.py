"""What published codebases print of a model, from their code or stand-ins for it, is what `fastdiff eval` gives."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from standins import bd3lm, duo, llada, mdlm, radd, sedd
from test_likelihood import tokenizer_folder
from test_published import hub_folder, made, sedd_folder
from test_published_code import CHECKOUTS, network_of
from torch import nn

from fastdiff.data.texts import Bytes
from fastdiff.loading import Loaded, load
from fastdiff.noise.graphs import Absorbing
from fastdiff.schedules import LogLinear

CPU = torch.device("cpu")
L, BATCH, REPEATS = 6, 25, 200  # of published evaluations, in batches over which their times are spread


class Backbone(nn.Module):
    """A network as MDLM, Duo and BD3-LM call theirs."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, sigma=None, **labels):
        return self.network(x, sigma)


class Scores(nn.Module):
    """SEDD's: 0 at the token, and with scale_by_sigma what its network gives less log((V - 1) expm1(sigma))."""

    def __init__(self, network, scaled):
        super().__init__()
        self.network, self.scaled = network, scaled

    def forward(self, x, sigma):
        output = self.network(x, sigma)
        if self.scaled:
            output = output - (torch.expm1(sigma).log() + math.log(output.shape[-1] - 1))[:, None, None]
        return output.scatter(-1, x[..., None], 0)


class LogProbs(nn.Module):
    """RADD's, whose mask is left out of the softmax."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        output = self.network(x)
        return torch.cat([output[..., :-1].log_softmax(-1), output[..., -1:]], -1)


def as_published(name, network, monkeypatch):
    """What a codebase calls its model, of a network of ours: its own if it is there."""
    kind, uniform = name.split()[0], name == "sedd uniform"
    if (CHECKOUTS / kind).is_dir():
        theirs = network_of(kind, network, monkeypatch, "uniform" if uniform else "absorb")
        theirs.scale_by_sigma = not uniform
        return theirs
    return (
        Scores(network, not uniform) if kind == "sedd" else LogProbs(network) if kind == "radd" else Backbone(network)
    )


def sedd_nll(model, states, x0, eps, uniform=False):
    graph = sedd.Uniform(states) if uniform else sedd.Absorbing(states - 1)
    noise = sedd.GeometricNoise(*GEOMETRIC) if uniform else sedd.LogLinearNoise()
    return sedd.get_loss_fn(noise, graph, False, sampling_eps=eps)(model, x0)


def radd_nll(model, states, x0, eps):
    return radd.PUBLISHED["losses"].get_loss_fn(None, states, False, loss_type="lambda_DCE")(model, x0)


def mdlm_nll(model, states, x0, eps):
    options = dict(noise=mdlm.LogLinearNoise(), antithetic_sampling=True, sampling_eps=eps, time_conditioning=False)
    evaluation = mdlm.given(mdlm.Diffusion, states, backbone=model, **options)
    return evaluation._loss(x0, torch.ones_like(x0)).nlls.sum(1)


def duo_nll(model, states, x0, eps):
    options = dict(noise=duo.LogLinear(1e-3), antithetic_sampling=True, sampling_eps=eps)
    evaluation = duo.given(duo.DUO_BASE, states, backbone=model, **options)
    return evaluation.nll(x0, None, None).sum(1)


def bd3lm_nll(model, states, x0, eps, ignore_bos=False):
    """In one block of all tokens."""
    config = SimpleNamespace(
        algo=SimpleNamespace(name="mdlm"),
        model=SimpleNamespace(length=L),
        training=SimpleNamespace(resample=False),
    )
    options = dict(noise=bd3lm.PUBLISHED["noise_schedule"].LogLinearNoise(), antithetic_sampling=True, config=config)
    options |= dict(cross_attn=False, ignore_bos=ignore_bos, block_size=L, training=False, time_conditioning=False)
    options |= dict(sampling_eps_min=eps, sampling_eps_max=1.0)
    evaluation = bd3lm.given(bd3lm.Diffusion, states, backbone=model, **options)
    return evaluation._loss(x0, torch.ones_like(x0)).nlls.sum(1)


GEOMETRIC = 1e-2, 8.0
EVALUATIONS = {
    "sedd": sedd_nll,
    "sedd uniform": lambda *arguments: sedd_nll(*arguments, uniform=True),
    "radd": radd_nll,
    "mdlm": mdlm_nll,
    "duo": duo_nll,
    "bd3lm": bd3lm_nll,
}


def saved(folder, name):
    """A checkpoint with a tokenizer beside it: its network and what to call it."""
    kind = name.split()[0]
    tokenizer = tokenizer_folder(folder)
    network = made(kind, len(tokenizer) + (name not in ("duo", "sedd uniform")))
    network.output_layer.linear.weight.data /= 3
    (sedd_folder if kind in ("sedd", "radd") else hub_folder)(folder, kind, network)
    if name == "sedd uniform":
        said = json.loads((folder / "config.json").read_text())
        noise = dict(type="geometric", sigma_min=GEOMETRIC[0], sigma_max=GEOMETRIC[1])
        said |= dict(graph=dict(type="uniform"), noise=noise)
        said["model"]["scale_by_sigma"] = False
        (folder / "config.json").write_text(json.dumps(said))
    return network.eval(), f"{kind}:{folder}"


def mean_and_stderr(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@torch.no_grad()
def printed(evaluation, *arguments):
    return mean_and_stderr(torch.stack([evaluation(*arguments).double().mean() for _ in range(REPEATS)]))


@pytest.mark.parametrize("eps", [1e-3, 0.2])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_integral_is_what_published_code_prints(name, eps, monkeypatch, tmp_path):
    torch.manual_seed(0)
    network, called = saved(tmp_path, name)
    scored = load(called, CPU, mask_index=network.config.num_states - 1)
    assert scored.eps == (None if name == "radd" else 1e-3)
    scored = dataclasses.replace(scored, eps=scored.eps and eps)
    states = network.config.num_states
    x0 = torch.randint(states - 1, (L,))
    model = as_published(name, network, monkeypatch)
    expected, error = printed(EVALUATIONS[name], model, states, x0.expand(BATCH, -1), eps)
    n = BATCH * REPEATS // 8
    found = scored.estimate(
        torch.zeros(n, 0, dtype=torch.int64),
        x0.expand(n, -1),
        torch.arange(n),
        likelihood="integral",
        num_samples=8,
    )
    ours, our_error = mean_and_stderr(found.nll)
    assert abs(ours - expected) < 4 * math.hypot(error, our_error)
    if eps > 0.1:  # where the published mean has no long tail, which would hide a wrong end
        assert math.hypot(error, our_error) < 0.03 * expected


def test_a_first_token_that_is_given(monkeypatch, tmp_path):
    """BD3-LM's ignore_bos: a context of one token."""
    torch.manual_seed(0)
    network, called = saved(tmp_path, "bd3lm")
    states = network.config.num_states
    scored = dataclasses.replace(load(called, CPU, mask_index=states - 1), eps=0.2)
    x0 = torch.randint(states - 1, (L,))

    def evaluation(*arguments):
        return bd3lm_nll(*arguments, ignore_bos=True)

    model = as_published("bd3lm", network, monkeypatch)
    expected, error = printed(evaluation, model, states, x0.expand(BATCH, -1), 0.2)
    given = x0[None].expand(500, -1)
    found = scored.estimate(given[:, :1], given[:, 1:], torch.arange(500), likelihood="integral", num_samples=8)
    ours, our_error = mean_and_stderr(found.nll)
    assert abs(ours - expected) < 4 * math.hypot(error, our_error) < 0.15 * expected


def test_of_models_of_transformers_it_is_what_llada_prints():
    network, states = made("radd", 23), 23
    prompt, answer = torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9, 2, 6])
    graph = Absorbing(states, states - 1)
    scored = Loaded(network, network, None, graph, LogLinear(), "logits", False, Bytes(), 8, [], CPU)

    class Model:
        device = CPU

        def __call__(self, x):
            return SimpleNamespace(logits=network(x))

    torch.manual_seed(0)
    prints = [
        -llada.get_log_likelihood(Model(), prompt, answer, mc_num=16, batch_size=16, mask_id=states - 1)
        for _ in range(REPEATS)
    ]
    expected, error = mean_and_stderr(torch.tensor(prints))
    found = scored.estimate(
        prompt.expand(1000, -1), answer.expand(1000, -1), torch.arange(1000), likelihood="integral", num_samples=16
    )
    ours, our_error = mean_and_stderr(found.nll)
    assert abs(ours - expected) < 4 * math.hypot(error, our_error) < 0.15 * expected
