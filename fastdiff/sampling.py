"""Generation: the noise process run backwards, with draws that are a pure function of their names."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import reference
from fastdiff.checks import check_choice, check_tokens
from fastdiff.graphs import Uniform
from fastdiff.philox import Purpose, draw32
from fastdiff.schedules import LogLinear, Schedule


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    *,
    num_samples: int = 1,
    length: int,
    steps: int,
    mask_index: int | None = None,
    graph: str = "absorb",
    parametrization: str = "logits",
    sampler: str = "tweedie",
    schedule: Schedule | None = None,
    prompt: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Draw sequences, from pure noise, in at most `steps` network passes.

    A step goes from noise sigma_t to sigma_s, the times evenly spaced from 1 to 0; the last one goes to no
    noise at all, so that no mask is left. Each position follows its own law p(x_s | x_t) (Tweedie):

    - from logits of the conditionals c: a mask stays with probability (1 - alpha_s) / (1 - alpha_t), else it
      is drawn from c;
    - from scores: proportional to (exp(-dS Q) score)_y exp(dS Q)(x_t, y), clamped at 0,
      dS = sigma_t - sigma_s.

    Draws are named by seed, step, sequence, position and token: no sequence depends on those beside it.

    Args:
        model: called as `model(xt)` for "logits", as `model(xt, sigma)` for "scale_by_sigma", with xt int64
            [num_samples, length] and sigma float32 [num_samples]. It gives [num_samples, length, V], or an
            object that has it as `.logits`. An nn.Module should be in evaluation mode.
        num_samples, length, steps: sequences, tokens in each (those of the prompt too), reverse steps.
        mask_index: id of the mask (absorbing graph); None means the last of `model.config.num_states`.
        graph: "absorb", or "uniform" for a model that has `config.num_states`, from which its noise is drawn.
        parametrization: "logits" of p(x_0 | x_t) (absorbing graph only), or "scale_by_sigma", see `dse_loss`.
        sampler: "tweedie".
        schedule: the noise; None means `LogLinear()`.
        prompt: [P] or [num_samples, P] int64 first tokens, kept as they are.
        temperature: > 0; the law of the token that replaces x_t is raised to 1 / temperature.
        seed: names the draws.

    Returns:
        int64 [num_samples, length].

    Raises:
        ValueError, TypeError: an argument that does not fit, or a model that returns another shape.
    """
    check_choice("graph", graph, ("absorb", "uniform"))
    check_choice("parametrization", parametrization, ("logits", "scale_by_sigma"))
    check_choice("sampler", sampler, ("tweedie",))
    if graph == "uniform" and parametrization == "logits":
        raise ValueError("parametrization: the uniform graph needs scores, 'scale_by_sigma', got 'logits'")
    for name, value in (("num_samples", num_samples), ("length", length), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    mask_index = _mask_index(model, mask_index) if graph == "absorb" else None
    if prompt is not None:
        _check_prompt(prompt, num_samples, length, mask_index)
    xt, moving = _start(model, num_samples, length, mask_index, prompt, seed)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=xt.device)
    sigmas = (schedule or LogLinear()).total_noise(times)
    sigmas[-1] = 0

    for step in range(steps):
        if mask_index is not None:
            moving = xt == mask_index
        sequence, position = moving.nonzero(as_tuple=True)
        if not len(sequence):
            break
        inputs = (xt,) if parametrization == "logits" else (xt, sigmas[step].float().expand(num_samples))
        rows, old = _logits(model(*inputs), xt)[moving], xt[moving]  # [M, V], [M]
        probs = _tweedie(rows, old, sigmas[step], sigmas[step + 1], mask_index, parametrization)
        probs = _temper(probs, old, temperature)
        tokens = torch.arange(probs.shape[1], device=xt.device)
        draws = draw32(seed, Purpose.RACE, step, sequence.unsqueeze(1), position.unsqueeze(1), tokens)
        xt[moving] = reference.race(probs.log(), draws)
    return xt


def _tweedie(
    rows: Tensor, xt: Tensor, sigma_t: Tensor, sigma_s: Tensor, mask_index: int | None, parametrization: str
) -> Tensor:
    """p(x_s | x_t) from the network's rows [M, V] at tokens xt [M]; uniform without a mask_index."""
    if parametrization == "logits" and mask_index is not None:
        return reference.absorb_reverse_step(rows, xt, sigma_t, sigma_s, mask_index)
    log_score = reference.scale_by_sigma(rows, sigma_t, xt)
    graph = "uniform" if mask_index is None else "absorb"
    probs = reference.reverse_step(graph, log_score, xt, sigma_t, sigma_s, mask_index)
    if mask_index is not None and sigma_s == 0:
        probs[:, mask_index] = 0  # learned scores do not add up, which would leave masks
    return probs


def _temper(probs: Tensor, xt: Tensor, temperature: float) -> Tensor:
    """Raise the law [M, V] of what replaces xt [M] to 1 / temperature; the probability of a change stays."""
    here = xt.unsqueeze(-1)
    change = probs.scatter(-1, here, 0)
    law = torch.softmax(change.log() / temperature, -1).nan_to_num(0)  # NaN where nothing can change
    return (law * change.sum(-1, keepdim=True)).scatter(-1, here, probs.gather(-1, here))


def _start(
    model: Callable[..., Any],
    num_samples: int,
    length: int,
    mask_index: int | None,
    prompt: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Noise with the prompt in front, int64, and where it may change, bool: [num_samples, length] each."""
    device = torch.device("cpu") if prompt is None else prompt.device
    if isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), device)
    if mask_index is None:
        xt = Uniform(_num_states(model, "graph")).sample_limit(num_samples, length, seed=seed, device=device)
    else:
        xt = torch.full((num_samples, length), mask_index, device=device)
    moving = torch.ones_like(xt, dtype=torch.bool)
    if prompt is not None:
        xt[:, : prompt.shape[-1]] = prompt.to(device)
        moving[:, : prompt.shape[-1]] = False
    return xt, moving


def _check_prompt(prompt: Tensor, num_samples: int, length: int, mask_index: int | None) -> None:
    check_tokens("prompt", prompt, None)
    if prompt.dim() not in (1, 2) or prompt.shape[-1] > length or prompt.shape[:-1] not in ((), (num_samples,)):
        raise ValueError(f"prompt: expected shape [P] or [{num_samples}, P], P <= {length}, got {tuple(prompt.shape)}")
    if (prompt < 0).any() or (mask_index is not None and (prompt == mask_index).any()):
        raise ValueError("prompt: expected ids >= 0 other than the mask's")


def _mask_index(model: Callable[..., Any], mask_index: int | None) -> int:
    mask_index = _num_states(model, "mask_index") - 1 if mask_index is None else mask_index
    if mask_index < 0:
        raise ValueError(f"mask_index: expected an id >= 0, got {mask_index}")
    return mask_index


def _num_states(model: Callable[..., Any], name: str) -> int:
    try:
        return model.config.num_states  # type: ignore[attr-defined]
    except AttributeError:
        raise ValueError(f"{name}: expected a model with config.num_states, which it follows from") from None


def _logits(output: Any, xt: Tensor) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != xt.shape:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected [{xt.shape[0]}, {xt.shape[1]}, V] numbers, got {came}")
    return logits
