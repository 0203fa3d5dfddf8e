"""Generation: the noise process run backwards, or masks revealed by confidence, with draws that are named."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastdiff.checks import check_choice, check_integer, check_tokens
from fastdiff.evaluating import Model, evaluating, model_parts
from fastdiff.generation.block_cache import Cache
from fastdiff.generation.block_sampling import BlockNetwork, checked_block_length, plans_of_blocks, unmask_blocks
from fastdiff.generation.tokens import check_temperature
from fastdiff.generation.unmasking import SAMPLERS, TIMED, Canvas, Network, Plan, moves_back, reverse, unmask
from fastdiff.losses.row_losses import PARAMETRIZATIONS
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.noise.mixture import Mixture
from fastdiff.schedules import LogLinear, Schedule

AnyGraph = Absorbing | Uniform | Mixture
AnyModel = Model | Callable[..., Any]  # of xt, or of xt and sigma


class Generated(NamedTuple):
    """Tokens [B, L], the trajectory [steps done + 1, B, L] from noise to them, and how many passes that took, each
    sequence that the network was asked about counting as one; clean blocks that a cache takes up are not counted."""

    tokens: Tensor
    trajectory: Tensor
    num_forwards: int


@overload
def sample(model: AnyModel, *, return_trajectory: Literal[False] = ..., **options: Any) -> Tensor: ...
@overload
def sample(model: AnyModel, *, return_trajectory: Literal[True], **options: Any) -> Generated: ...
def sample(  # type: ignore[misc]  # the overloads only tell apart what comes back
    model: AnyModel,
    *,
    num_samples: int = 1,
    length: int | None = None,
    steps: int | None = None,
    mask_index: int | None = None,
    graph: str | AnyGraph = "absorb",
    parametrization: str = "logits",
    sampler: str = "tweedie",
    schedule: Schedule | None = None,
    prompt: Tensor | None = None,
    infill: Tensor | None = None,
    block_length: int | None = None,
    block_causal: bool = False,
    cache: Cache | None = None,
    end_token: int | None = None,
    guidance: float = 0.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    exclude_mask: bool = True,
    exclude: Iterable[int] = (),
    seed: int = 0,
    return_trajectory: bool = False,
    backend: str | None = None,
) -> Tensor | Generated:
    """Draws sequences from a model: whole ones, after a prompt, or around the tokens of an infill.

    By noise, at times evenly spaced from 1 to 0; the last step goes to no noise at all, so that no mask is left:

    - "tweedie", "ancestral": p(x_s | x_t) of each token by itself. From conditionals, a mask is revealed with
      probability 1 - (1 - alpha_s) / (1 - alpha_t) and then drawn from them; else see `reverse_step`, and of a
      `Mixture`, where all tokens but the given ones may change, `mixture_reverse_step`.
    - "euler": by rates; from conditionals, with probability (t - s) dsigma(t) / expm1(sigma(t)).

    By conditionals of the absorbing graph alone:

    - "first_hitting": in each pass one position, drawn uniformly. Exact.
    - "confidence", "margin", "entropy", "random" (LLaDA, Dream): in blocks from left to right, each with its share of
      the steps. A step draws a token for every mask of the block and reveals those with the largest probability of
      their token, gap between the largest two, or negative entropy, or at random: n // k of n masks in k steps, and
      one more in the first n % k.

    A block model, trained to fill a block given the clean blocks before it, comes with its `cache` or with
    block_causal=True. Blocks then start at position 0, as in training, and are filled from left to right, in each of
    which the sampler, any of these, begins anew.

    A sequence that reveals nothing in a step is not passed through the network; nothing is once no mask is left.
    Draws are named by seed, step, sequence and position: no sequence depends on those beside it.

    Args:
        model: xt int64 [b, L] -> logits [b, L, V] of the conditionals p(x_0 | x_t), or an object with `.logits`; or a
            pair (body, lm_head) of xt -> hidden states [b, L, D] and the last layer, whose logits are made only where
            tokens are drawn. For scores, the uniform graph or a mixture a callable of xt and sigma, float32 [b]. A
            module is put into evaluation mode meanwhile.
        num_samples, length: sequences, tokens in each (those of the prompt too). An infill has a length.
        steps: of all blocks together; None means as many as there are positions after the prompt.
        mask_index: id of the mask (absorbing graph); None means `model.config.mask_token_id` where there is one, else
            the last of `model.config.num_states`.
        graph: "absorb", or "uniform" for a model that has `config.num_states`; or an `Absorbing`, `Uniform` or
            `Mixture`, whose share is that of the schedule, if this is a `Hybrid`, or the same at all times.
        parametrization: what the model gives: "logits" ("log_probs"), or "log_score", "scale_by_sigma", see `dse_loss`.
        sampler: one of the above.
        schedule: the noise of "tweedie", "ancestral" and "euler"; None means `LogLinear()`.
        prompt: [P] or [num_samples, P] int64 first tokens, kept as they are.
        infill: [L] or [num_samples, L] int64 tokens to keep, with -1 (or the mask) where tokens are drawn.
        block_length: of LLaDA's blocks, which start after the prompt; None means one block. Or of a block model's, the
            last of which may be short, and where a prompt may end inside one; None means its cache's.
        block_causal: model is a block model. About a block it is asked with xt [b, n], all tokens up to its end; what
            earlier blocks see is the model's own concern (`blocks.block_causal` is the mask of attention).
        cache: a block model's, of num_samples sequences. It is asked in the model's place, with a block alone:
            `DiffusionTransformer.cache`, or another `block_cache.Cache`. It may hold what the sequences begin with, and
            in the end holds all blocks but the last.
        end_token: of a block model. After the first that is drawn a sequence is filled with it, where nothing is
            given, and not passed through the network any more.
        guidance: classifier-free, w: from logits un + (w + 1) (cond - un), un with the given tokens masked too.
        temperature: >= 0; the law of the token that replaces x_t is raised to 1 / temperature; 0 takes the likeliest.
        top_k, top_p, exclude_mask: see `sample_tokens`, for conditionals of the absorbing graph. A mask that is drawn
            stays one.
        exclude: other ids never to draw, such as those that fill a vocabulary up; for the absorbing graph.
        seed: names the draws.
        return_trajectory: give a `Generated`.
        backend: None for the best that can run, else "cpu", "triton" or "reference".

    Returns:
        int64 [num_samples, length], or a `Generated`, on the device of the module, else on that of the tokens given.

    Raises:
        ValueError, TypeError: an argument that does not fit, or a model that returns another shape.
        BackendUnavailable: the backend named cannot run here.
    """
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    check_choice("sampler", sampler, tuple(SAMPLERS))
    graph, exclude = _graph(model, graph, mask_index), tuple(exclude)
    num_samples, seed = check_integer("num_samples", num_samples, 1), check_integer("seed", seed)
    length, steps = _at_least_one("length", length), _at_least_one("steps", steps)
    given = _given(num_samples, length, prompt, infill, graph.mask_index)
    start = 0 if prompt is None else prompt.shape[-1]
    in_blocks = block_causal or cache is not None
    _check_end_token(end_token, graph.mask_index, in_blocks)
    within = None if in_blocks else block_length  # a block model's sampler has one block at a time
    _check_plan(sampler, given.shape[1] - start, steps=steps, block_length=within, schedule=schedule)
    options: dict[str, Any] = dict(mask_index=graph.mask_index, temperature=check_temperature(temperature))
    options |= dict(exclude=exclude, seed=seed, backend=backend)
    share = None
    if isinstance(graph, Mixture):
        share = _share(graph, schedule, parametrization, sampler)
        graph = dataclasses.replace(
            graph, share=share(torch.ones((), dtype=torch.float64, device="cpu"))
        )  # of what it starts from
    by_sigma = graph.name != "absorb" or parametrization not in ("logits", "log_probs")
    if by_sigma:
        only: dict[str, Any] = dict(guidance=guidance or None, top_k=top_k, top_p=top_p)
        only |= dict(exclude_mask=None if exclude_mask else False, block_causal=block_causal or None, cache=cache)
        _check_by_sigma(model, sampler, **only)
    if exclude and graph.name != "absorb":
        raise ValueError(f"exclude: needs the absorbing graph, got {exclude}")
    if not math.isfinite(guidance) or (guidance and in_blocks):
        raise ValueError(
            f"guidance: expected {'0 with a block model' if in_blocks else 'a finite number'}, got {guidance}"
        )

    moves = partial(moves_back, schedule or LogLinear(), euler=sampler == "euler", share=share)
    network: Network
    if in_blocks:
        network, block_length = BlockNetwork(model, cache), checked_block_length(block_length, cache, given)
        plans = plans_of_blocks(given.shape[1], start, block_length, steps, moves)
    else:
        network = Network(model, guidance if (given >= 0).any() else 0.0)  # with nothing given, un is cond
        steps = given.shape[1] - start if steps is None else steps
        plans = [(slice(None), Plan(steps, block_length, moves(steps)))]
    if any(plan.moves and plan.moves[0].sigma == math.inf for _, plan in plans) and (by_sigma or sampler == "euler"):
        raise ValueError(f"schedule: expected finite noise at time 1 (an eps > 0), got {schedule}")
    canvas = _canvas(network, given if cache is None else given.to(cache.tokens.device), graph, start, seed)
    if by_sigma:
        if share is None:
            options |= dict(graph=graph.name, parametrization=parametrization)
        else:
            del options["exclude"]  # the mask alone is never drawn for another token
        filling = reverse(canvas, network, plans[0][1], options)
    else:
        options |= dict(exclude_mask=exclude_mask, top_k=top_k, top_p=top_p)
        if isinstance(network, BlockNetwork):
            filling = unmask_blocks(canvas, network, plans, SAMPLERS[sampler], options, end_token)
        else:
            filling = unmask(canvas, network, plans[0][1], SAMPLERS[sampler], options)

    frames = [canvas.xt.clone()]
    with evaluating(model_parts(model)[0], sum(plan.steps for _, plan in plans), unit="steps") as advance:
        for _ in filling:
            advance(1)
            if return_trajectory:
                frames.append(canvas.xt.clone())
    return Generated(canvas.xt, torch.stack(frames), network.num_forwards) if return_trajectory else canvas.xt


def _share(graph: Mixture, schedule: Schedule | None, parametrization: str, sampler: str) -> Callable[[Tensor], Tensor]:
    """The share of uniform noise, as a function of times."""
    if parametrization not in ("logits", "log_probs") or sampler == "euler":
        raise ValueError(
            "parametrization, sampler: a Mixture needs conditionals and 'tweedie' or 'ancestral', "
            f"got {parametrization!r} and {sampler!r}"
        )
    return lambda t: graph.at(schedule or LogLinear(), t)[0].shares(t.shape, t.device)


def _canvas(network: Network, given: Tensor, graph: AnyGraph, start: int, seed: int) -> Canvas:
    """Noise around what is given, on the model's device."""
    module, device = getattr(network.body, "__self__", network.body), given.device
    if network.lm_head is not None:
        device = network.lm_head.device
    elif isinstance(module, nn.Module):
        device = next((p.device for p in module.parameters() if not p.is_meta), device)  # an offloaded one is nowhere
    given = given.to(device)
    if isinstance(graph, Absorbing):
        noise = graph.sample_limit(*given.shape, device=device)
    else:
        noise = graph.sample_limit(*given.shape, seed=seed, device=device)
    mask_index = graph.mask_index if isinstance(graph, Absorbing) else None
    return Canvas(given.where(given >= 0, noise), given < 0, mask_index, start, seed)


def _given(
    num_samples: int, length: int | None, prompt: Tensor | None, infill: Tensor | None, mask_index: int | None
) -> Tensor:
    """Tokens that are given, and -1 elsewhere: int64 [num_samples, length]."""
    if infill is not None:
        if prompt is not None:
            raise ValueError("prompt, infill: expected one of the two; an infill may begin with a prompt")
        return _spread_infill(infill, num_samples, length, mask_index)
    if length is None:
        raise ValueError("length: expected at least 1, got None")
    if prompt is None:
        return torch.full((num_samples, length), -1, device="cpu")
    check_tokens("prompt", prompt, None)
    if prompt.dim() not in (1, 2) or prompt.shape[-1] > length or prompt.shape[:-1] not in ((), (num_samples,)):
        raise ValueError(f"prompt: expected shape [P] or [{num_samples}, P], P <= {length}, got {tuple(prompt.shape)}")
    if (prompt < 0).any() or (mask_index is not None and (prompt == mask_index).any()):
        raise ValueError("prompt: expected ids >= 0 other than the mask's")
    given = torch.full((num_samples, length), -1, device=prompt.device)
    given[:, : prompt.shape[-1]] = prompt
    return given


def _at_least_one(name: str, value: int | None) -> int | None:
    return None if value is None else check_integer(name, value, 1)


def _spread_infill(infill: Tensor, num_samples: int, length: int | None, mask_index: int | None) -> Tensor:
    check_tokens("infill", infill, None)
    if infill.dim() not in (1, 2) or infill.shape[-1] < 1 or infill.shape[:-1] not in ((), (num_samples,)):
        raise ValueError(f"infill: expected shape [L] or [{num_samples}, L], L >= 1, got {tuple(infill.shape)}")
    if length not in (None, infill.shape[-1]):
        raise ValueError(f"length: expected that of the infill, {infill.shape[-1]}, or None, got {length}")
    if (infill < -1).any():
        raise ValueError(f"infill: expected ids >= 0, or -1 where tokens are drawn, got {int(infill.min())}")
    given = infill.long() if mask_index is None else infill.long().masked_fill(infill == mask_index, -1)
    return given.expand(num_samples, -1)


def _check_plan(sampler: str, positions: int, **options: Any) -> None:
    for name, value in options.items():
        if value is not None and name not in SAMPLERS[sampler].takes:
            raise ValueError(f"{name}: the sampler {sampler!r} takes none, got {value!r}")
    steps, block_length = options["steps"], options["block_length"]
    if block_length is None:
        return
    if check_integer("block_length", block_length) < 1 or positions % block_length:
        raise ValueError(f"block_length: expected a divisor of the {positions} positions to fill, got {block_length}")
    if steps is not None and positions and steps % (positions // block_length):
        raise ValueError(f"steps: expected a multiple of the {positions // block_length} blocks, got {steps}")


def _check_end_token(end_token: int | None, mask_index: int | None, in_blocks: bool) -> None:
    if end_token is None:
        return
    if not in_blocks:
        raise ValueError(f"end_token: needs a block model (block_causal=True, or its cache), got {end_token}")
    if check_integer("end_token", end_token, 0) == mask_index:
        raise ValueError(f"end_token: expected another id than the mask's, got {end_token}")


def _check_by_sigma(model: AnyModel, sampler: str, **options: Any) -> None:
    """What scores and the uniform graph do not go with."""
    if sampler not in TIMED:
        raise ValueError(f"sampler: {sampler!r} needs conditionals of the absorbing graph; expected one of {TIMED}")
    if not callable(model):
        raise TypeError(f"model: expected a callable of xt and sigma, got {model!r}")
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: needs conditionals of the absorbing graph, got {value}")


def _graph(model: AnyModel, graph: str | AnyGraph, mask_index: int | None) -> AnyGraph:
    if isinstance(graph, AnyGraph):
        if mask_index not in (None, graph.mask_index):
            raise ValueError(f"mask_index: expected that of {graph} or None, got {mask_index}")
        return graph
    check_choice("graph", graph, ("absorb", "uniform"))
    if graph == "uniform":
        return Uniform(_num_states(model, "graph"))
    if mask_index is None:
        mask_index = getattr(getattr(model, "config", None), "mask_token_id", None)
    if mask_index is None:
        return Absorbing(_num_states(model, "mask_index"))
    if check_integer("mask_index", mask_index) < 0:
        raise ValueError(f"mask_index: expected an id >= 0, got {mask_index}")
    return Absorbing(mask_index + 2, mask_index)  # how many ids there are, the model will tell; here it does not matter


def _num_states(model: AnyModel, name: str) -> int:
    try:
        return model.config.num_states  # type: ignore[union-attr]
    except AttributeError:
        raise ValueError(f"{name}: expected a model with config.num_states, which it follows from") from None
