"""Sequences drawn from a model by the samplers that fit it, whole or around given tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff import Uniform, sample
from fastdiff.generation.sampling import Generated
from fastdiff.generation.unmasking import SAMPLERS, TIMED
from fastdiff.loading import Loaded


def samplers_of(model: Loaded) -> list[str]:
    """Those of `fastdiff.sample` that fit a model and differ.

    "ancestral" is "tweedie" by another name; and "euler" comes to the same where noise masks, as `LogLinear` has it.
    """
    same = {"ancestral"} if isinstance(model.graph, Uniform) else {"ancestral", "euler"}
    return [name for name in (TIMED if model.conditionals is None else SAMPLERS) if name not in same]


def numbers_of_steps(model: Loaded, sampler: str, asked: Sequence[int]) -> list[int]:
    """Those asked for that a sampler can take for a whole sequence."""
    if sampler == "first_hitting":
        return [model.length]
    blocks = -(-model.length // (model.block_length or model.length))
    most = model.length - (sampler == "random")  # which in one step for each token is first-hitting
    return [steps for steps in asked if steps % blocks == 0 and steps <= most]


def fill(model: Loaded, sampler: str, given: Tensor, steps: int) -> Generated:
    """Draws what is -1 of [n, L], the network in bfloat16."""
    by_score = model.conditionals is None or (model.score is not None and sampler in TIMED)
    front = torch.tensor(model.front, dtype=torch.int64).expand(len(given), -1)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample(
            model.score if by_score else model.conditionals,
            num_samples=len(given),
            infill=torch.cat([front, given], 1),
            steps=None if sampler == "first_hitting" else steps,
            graph=model.graph,
            schedule=model.schedule if by_score else None,
            parametrization=model.parametrization if by_score else "logits",
            sampler=sampler,
            cache=model.cache(len(given)) if model.block_length else None,
            return_trajectory=True,
        )
    return drawn._replace(tokens=drawn.tokens[:, front.shape[1] :])
