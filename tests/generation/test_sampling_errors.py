"""What samplers refuse."""

import math

import pytest
import torch
from samplers import P, product

from fastdiff.generation.sampling import sample
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.schedules import LogLinear

SCORES = {"parametrization": "scale_by_sigma"}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"sampler": "dpm"}, ValueError, "sampler: expected one of 'tweedie', 'euler'.*'random', got 'dpm'"),
        ({"graph": "cosine"}, ValueError, "graph: expected one of 'absorb', 'uniform'"),
        ({"graph": "uniform"}, ValueError, "graph: expected a model with config"),
        ({"graph": Absorbing(5), "mask_index": 3}, ValueError, r"mask_index: expected that of Absorbing\(.*got 3"),
        ({"parametrization": "score"}, ValueError, "parametrization: expected one of"),
        ({"mask_index": None}, ValueError, "mask_index: expected a model with config.num_states"),
        ({"mask_index": -1}, ValueError, "mask_index: expected an id >= 0, got -1"),
        ({"mask_index": 5}, ValueError, r"mask_index: expected an id in \[-5, 5\), got 5"),
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1, got 0"),
        ({"num_samples": True}, TypeError, "num_samples: expected an int, got True"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
        ({"steps": 2.0}, TypeError, "steps: expected an int, got 2.0"),
        ({"exclude": range(5)}, ValueError, "exclude: expected to leave one of 5 ids, got all"),
        ({"exclude": [7]}, ValueError, r"exclude: expected an id in \[-5, 5\), got 7"),
        ({"exclude": [0.0]}, TypeError, "exclude: expected an int, got 0.0"),
        (
            {"graph": Uniform(5), "mask_index": None, "exclude": [1]},
            ValueError,
            r"exclude: needs the absorbing graph, got \(1,\)",
        ),
        ({"length": 0}, ValueError, "length: expected at least 1, got 0"),
        ({"length": None}, ValueError, "length: expected at least 1, got None"),
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"sampler": "first_hitting"}, ValueError, "steps: the sampler 'first_hitting' takes none, got 2"),
        ({"block_length": 3}, ValueError, "block_length: the sampler 'tweedie' takes none, got 3"),
        ({"sampler": "random", "schedule": LogLinear()}, ValueError, "schedule: the sampler 'random' takes none"),
        ({"sampler": "margin", "block_length": 2}, ValueError, "block_length: expected a divisor of the 3 pos.*got 2"),
        ({"sampler": "margin", "block_length": 0}, ValueError, "block_length: expected a divisor of the 3 pos.*got 0"),
        ({"sampler": "margin", "block_length": 1}, ValueError, "steps: expected a multiple of the 3 blocks, got 2"),
        ({"temperature": -0.5}, ValueError, "temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": math.inf}, ValueError, "temperature: expected a finite number >= 0, got inf"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1 or None, got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \(0, 1\] or None, got 1.5"),
        ({"backend": "tpu"}, ValueError, "backend"),
        ({"guidance": math.nan}, ValueError, "guidance: expected a finite number, got nan"),
        (SCORES | {"guidance": 1.0}, ValueError, "guidance: needs conditionals of the absorbing graph, got 1.0"),
        (SCORES | {"top_k": 3}, ValueError, "top_k: needs conditionals of the absorbing graph, got 3"),
        (SCORES | {"top_p": 0.5}, ValueError, "top_p: needs conditionals of the absorbing graph, got 0.5"),
        (SCORES | {"exclude_mask": False}, ValueError, "exclude_mask: needs conditionals of the absorbing graph"),
        (SCORES | {"sampler": "random"}, ValueError, "sampler: 'random' needs conditionals of the absorbing graph"),
        (SCORES | {"model": (product, P)}, TypeError, r"model: expected a callable of xt and sigma, got \("),
        ({"model": (product, 3)}, TypeError, r"model: expected a callable, or a pair \(body, lm_head\)"),
        ({"prompt": [1]}, TypeError, "prompt: expected a torch.Tensor"),
        ({"prompt": torch.ones(2)}, TypeError, "prompt: expected int64"),
        ({"prompt": torch.zeros(4).long()}, ValueError, r"prompt: expected shape \[P\].*P <= 3, got \(4,\)"),
        ({"prompt": torch.zeros(2, 2).long()}, ValueError, r"prompt: expected shape \[P\] or \[1, P\]"),
        ({"prompt": torch.tensor([4])}, ValueError, "prompt: expected ids >= 0 other than the mask's"),
        ({"prompt": torch.tensor([-1])}, ValueError, "prompt: expected ids >= 0 other than the mask's"),
        ({"infill": [1]}, TypeError, "infill: expected a torch.Tensor"),
        ({"infill": torch.ones(3)}, TypeError, "infill: expected int64"),
        ({"infill": torch.zeros(2, 3).long()}, ValueError, r"infill: expected shape \[L\] or \[1, L\].*got \(2, 3\)"),
        ({"infill": torch.zeros(0).long()}, ValueError, r"infill: expected shape \[L\].*L >= 1, got \(0,\)"),
        ({"infill": torch.zeros(4).long()}, ValueError, "length: expected that of the infill, 4, or None, got 3"),
        ({"infill": torch.tensor([0, -2, 1])}, ValueError, "infill: expected ids >= 0, or -1 .*got -2"),
        (
            {"infill": torch.zeros(3).long(), "prompt": torch.zeros(1).long()},
            ValueError,
            "prompt, infill: expected one",
        ),
    ],
)
def test_bad_arguments(changes, error, text):
    arguments = {"model": product, "length": 3, "steps": 2, "mask_index": 4} | changes
    with pytest.raises(error, match=text):
        sample(arguments.pop("model"), **arguments)


@pytest.mark.parametrize("output", [torch.zeros(1, 2, 5), torch.zeros(3, 5), None])
def test_bad_model(output):
    with pytest.raises(ValueError, match=r"model: expected \[1, 3, V\] numbers, got"):
        sample(lambda xt: output, length=3, steps=2, mask_index=4)
