import math
from types import SimpleNamespace

import pytest
import torch

from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.sampling import sample
from fastdiff.schedules import Geometric

P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.05, 0.45]])  # [L, 4] laws


def product(xt):
    """Conditionals of independent tokens with laws P. The mask is 4, whose own logit never matters."""
    return torch.cat((P.log(), torch.full((len(P), 1), 7.0)), 1).expand(len(xt), -1, -1)


def product_scores(xt, sigma):
    """The same as SEDD's output: its tail, - log e1 - log(V - 1), leaves log c - log e1."""
    return product(xt) + math.log(4)


class UniformProduct:
    """True scores p_t(y) / p_t(x_t) of independent tokens with laws P, noised uniformly."""

    config = SimpleNamespace(num_states=4)

    def __call__(self, xt, sigma):
        alpha = torch.exp(-sigma.double()).view(-1, 1, 1)
        pt = alpha * P.double() + (1 - alpha) / 4
        score = pt / pt.gather(-1, xt.unsqueeze(-1))
        return score.log() + torch.log(torch.expm1(sigma.double())).view(-1, 1, 1) + math.log(3)


def chi_square(x: torch.Tensor, laws: torch.Tensor) -> float:
    counts = torch.stack([torch.bincount(column, minlength=laws.shape[1]) for column in x.T]).double()
    expected = laws.double() * len(x)
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("model", ["logits", "scale_by_sigma", "uniform"])
def test_product_law(model, steps):
    n = 3000
    if model == "uniform":
        x = sample(
            UniformProduct(),
            num_samples=n,
            length=3,
            steps=steps,
            graph="uniform",
            parametrization="scale_by_sigma",
            seed=5,
        )
    else:
        network = product if model == "logits" else product_scores
        x = sample(network, num_samples=n, length=3, steps=steps, mask_index=4, parametrization=model, seed=5)
    assert x.shape == (n, 3)
    assert x.dtype == torch.int64
    assert x.max() < 4
    assert chi_square(x, P) < 27.9  # 9 degrees of freedom, 0.1%
    pairs = 4 * x[:, :1] + x[:, 1:2]
    assert chi_square(pairs, (P[0].unsqueeze(1) * P[1]).view(1, 16)) < 37.7  # 15 degrees of freedom, 0.1%


def test_another_schedule_and_no_mask_left():
    x = sample(product, num_samples=500, length=3, steps=3, mask_index=4, schedule=Geometric(0.5, 20.0))
    assert x.max() < 4
    assert chi_square(x, P) < 27.9


def test_scores_that_do_not_add_up_leave_no_mask():
    def weak(xt, sigma):
        return product_scores(xt, sigma) - 3.0

    settings = {
        "num_samples": 200,
        "length": 3,
        "steps": 3,
        "mask_index": 4,
        "parametrization": "scale_by_sigma",
    }
    assert sample(weak, **settings).max() < 4


def test_temperature():
    settings = {"num_samples": 3000, "length": 3, "steps": 3, "mask_index": 4, "temperature": 0.5}
    sharp = P**2 / (P**2).sum(1, keepdim=True)
    assert chi_square(sample(product, **settings), sharp) < 27.9
    assert chi_square(sample(product, **settings | {"temperature": 1.0}), sharp) > 100
    scores = sample(product_scores, parametrization="scale_by_sigma", **settings)
    assert chi_square(scores, sharp) < 27.9


@pytest.mark.parametrize("prompt", [torch.tensor([3, 3]), torch.arange(6).view(3, 2) % 4])
def test_prompt_is_kept(prompt):
    seen = []

    def model(xt):
        seen.append(xt.clone())
        return product(xt)

    x = sample(model, num_samples=3, length=3, steps=4, mask_index=4, prompt=prompt)
    assert torch.equal(x[:, :2], prompt.expand(3, 2))
    assert all(torch.equal(xt[:, :2], prompt.expand(3, 2)) for xt in seen)
    whole = sample(model, num_samples=3, length=2, steps=4, mask_index=4, prompt=prompt)
    assert torch.equal(whole, prompt.expand(3, 2))


def test_prompt_is_kept_by_the_uniform_graph():
    prompt = torch.tensor([0])
    x = sample(
        UniformProduct(),
        num_samples=50,
        length=3,
        steps=4,
        graph="uniform",
        parametrization="scale_by_sigma",
        prompt=prompt,
    )
    assert (x[:, 0] == 0).all()
    assert x[:, 1:].unique().tolist() == [0, 1, 2, 3]


def test_names_alone_decide():
    settings = {"length": 3, "steps": 4, "mask_index": 4}
    x = sample(product, num_samples=40, seed=1, **settings)
    assert torch.equal(x[:7], sample(product, num_samples=7, seed=1, **settings))
    assert not torch.equal(x, sample(product, num_samples=40, seed=2, **settings))
    assert len(x.unique(dim=0)) > 10


def test_at_most_one_pass_a_step_and_none_without_need():
    calls = []

    def model(xt):
        calls.append((xt == 4).sum().item())
        return product(xt)

    sample(model, length=3, steps=50, mask_index=4)
    assert len(calls) <= 50
    assert calls[0] == 3
    assert min(calls) > 0


@pytest.mark.parametrize("loss", ["time-free", "absorb", "uniform"])
def test_transformer(loss):
    graph = "uniform" if loss == "uniform" else "absorb"
    conditioned = loss != "time-free"
    model = DiffusionTransformer(ModelConfig(5, 6, 16, 1, 2, conditioned)).eval()
    x = sample(
        model,
        num_samples=9,
        length=6,
        steps=3,
        graph=graph,
        parametrization="scale_by_sigma" if conditioned else "logits",
        prompt=torch.tensor([1]),
    )
    assert x.shape == (9, 6)
    assert x.max() == (4 if graph == "uniform" else 3)  # id 4 is a token there, and the mask here


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"sampler": "euler"}, ValueError, "sampler: expected one of 'tweedie', got 'euler'"),
        ({"graph": "cosine"}, ValueError, "graph: expected one of 'absorb', 'uniform'"),
        ({"parametrization": "log_score"}, ValueError, "parametrization: expected one of"),
        ({"graph": "uniform"}, ValueError, "parametrization: the uniform graph needs scores"),
        (
            {"graph": "uniform", "parametrization": "scale_by_sigma"},
            ValueError,
            "graph: expected a model with config",
        ),
        ({"mask_index": None}, ValueError, "mask_index: expected a model with config.num_states"),
        ({"mask_index": -1}, ValueError, "mask_index: expected an id >= 0, got -1"),
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"length": 0}, ValueError, "length: expected at least 1, got 0"),
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        ({"prompt": [1]}, TypeError, "prompt: expected a torch.Tensor"),
        ({"prompt": torch.ones(2)}, TypeError, "prompt: expected int64"),
        ({"prompt": torch.zeros(4).long()}, ValueError, r"prompt: expected shape \[P\].*P <= 3, got \(4,\)"),
        ({"prompt": torch.zeros(2, 2).long()}, ValueError, r"prompt: expected shape \[P\] or \[1, P\]"),
        ({"prompt": torch.tensor([4])}, ValueError, "prompt: expected ids >= 0 other than the mask's"),
        ({"prompt": torch.tensor([-1])}, ValueError, "prompt: expected ids >= 0 other than the mask's"),
    ],
)
def test_bad_arguments(changes, error, text):
    with pytest.raises(error, match=text):
        sample(product, **({"length": 3, "steps": 2, "mask_index": 4} | changes))


@pytest.mark.parametrize("output", [torch.zeros(1, 2, 5), torch.zeros(3, 5), None])
def test_bad_model(output):
    with pytest.raises(ValueError, match=r"model: expected \[1, 3, V\] numbers, got"):
        sample(lambda xt: output, length=3, steps=2, mask_index=4)


def test_output_object():
    x = sample(product, length=3, steps=2, mask_index=4)
    wrapped = sample(lambda xt: SimpleNamespace(logits=product(xt)), length=3, steps=2, mask_index=4)
    assert torch.equal(x, wrapped)
