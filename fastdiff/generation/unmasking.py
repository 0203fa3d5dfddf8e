"""Orders in which masked tokens are revealed, and the networks that are asked for them.

An order is a generator: at each step it looks at the canvas, which is filled between two steps, and says where to draw.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.evaluating import Model, model_parts
from fastdiff.generation.mixture_step import mixture_reverse_step
from fastdiff.generation.reverse import reverse_step
from fastdiff.generation.tokens import linear_sample_tokens, sample_tokens
from fastdiff.philox import Purpose, draw32
from fastdiff.schedules import Schedule


@dataclass
class Canvas:
    """Sequences that are filled in place.

    xt: [B, L] int64. free: [B, L] bool, tokens that are not given. mask_index: None where other
    tokens may change too. start: the
    first position after the prompt. seed: names the draws.
    """

    xt: Tensor
    free: Tensor
    mask_index: int | None
    start: int
    seed: int

    def moving(self) -> Tensor:
        """Where tokens may still change, bool [B, L]."""
        return self.free if self.mask_index is None else self.xt == self.mask_index

    def draws(self, step: int) -> Tensor:
        """Unsigned 32-bit draws [B, L], as int64; those of `reverse_step` for whether a token stays."""
        sample, position = (torch.arange(n, device=self.xt.device) for n in self.xt.shape)
        return draw32(self.seed, Purpose.STEP, step, sample.unsqueeze(1), 0, position)


class Move(NamedTuple):
    """One step back from noise sigma: to sigma_next = after, or (Euler) by step_size = after, which is dt dsigma.

    shares: in a mixture, those of uniform noise before and after.
    """

    sigma: float
    after: float
    euler: bool
    shares: tuple[float, float] | None = None

    def draw(self, output: Tensor, xt: Tensor, **options: Any) -> Tensor:
        """The tokens after the step, from what a network says of those before."""
        if self.shares is not None:
            before, after = self.shares
            return mixture_reverse_step(
                output, xt, self.sigma, before, sigma_next=self.after, share_next=after, **options
            )
        step: dict[str, Any] = {"step_size" if self.euler else "sigma_next": self.after}
        return reverse_step(output, xt, self.sigma, **step, **options)

    def stay(self) -> float:
        """The probability that a mask stays one, from conditionals whatever they are."""
        masked = -math.expm1(-self.sigma)
        if self.euler:
            return max(0.0, 1 - self.after * math.exp(-self.sigma) / masked)  # after / expm1(sigma), not overflowing
        return -math.expm1(-self.after) / masked


def moves_back(
    schedule: Schedule, steps: int, euler: bool, share: Callable[[Tensor], Tensor] | None = None
) -> list[Move]:
    """Steps evenly spaced in time, of which the last goes to no noise at all: the final denoise, also for Euler."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")
    sigma, dsigma = (values.tolist() for values in schedule(times))
    moves = [Move(sigma[i], dsigma[i] / steps if euler else sigma[i + 1], euler) for i in range(steps)]
    moves = moves[:-1] + [Move(last.sigma, 0.0, False) for last in moves[-1:]]
    if share is None:
        return moves
    shares = share(times).tolist()
    return [move._replace(shares=pair) for move, pair in zip(moves, itertools.pairwise(shares), strict=True)]


class Plan(NamedTuple):
    """How many steps, in blocks of how many positions (None: one block), or by which moves; the first step's number."""

    steps: int
    block_length: int | None
    moves: list[Move]
    first: int = 0


class Step(NamedTuple):
    """Draw tokens `where` [B, L] is true, and reveal `size` [B] of them. The number names the draws."""

    number: int
    where: Tensor
    size: Tensor


def by_noise(canvas: Canvas, plan: Plan) -> Iterator[Step]:
    """Each mask by itself, as often as noise would have put it there: known before any network is asked."""
    for number, move in enumerate(plan.moves, plan.first):
        masked = canvas.moving()
        if not masked.any():
            return
        revealed = masked & (canvas.draws(number) >= round(move.stay() * 2**32))
        yield Step(number, revealed, revealed.sum(1))


def at_random(canvas: Canvas, plan: Plan) -> Iterator[Step]:
    """LLaDA's blocks and counts, positions drawn uniformly.

    One position a step is first-hitting: the reverse process, exactly, jump by jump. When the jump from n masks at
    lambda happens, at lambda u^(1/n), is left out, since no conditional depends on it.
    """
    for number, masked, size in by_blocks(canvas, plan):
        yield Step(number, largest(canvas.draws(number), masked, size), size)


def by_blocks(canvas: Canvas, plan: Plan) -> Iterator[Step]:
    """LLaDA's blocks from left to right: the steps shared evenly by the blocks, and the masks by the steps of a block,
    the first of which reveal one more if need be."""
    length = canvas.xt.shape[1]
    starts = range(canvas.start, length, plan.block_length or max(1, length - canvas.start))
    for block, start in enumerate(starts):
        end = start + starts.step
        steps, masks = plan.steps // len(starts), canvas.moving()[:, start:end].sum(1)
        for i in range(steps):
            masked = canvas.moving()
            masked[:, end:] = False  # masks in front of the block, where a mask was drawn, have another chance
            if not masked.any():
                break
            size = masks // steps + (i < masks % steps)
            yield Step(plan.first + block * steps + i, masked & (size > 0).unsqueeze(1), size)


def largest(score: Tensor, among: Tensor, size: Tensor) -> Tensor:
    """The size [B] positions of largest score [B, L] among those given, bool [B, L]; ties go to the lowest."""
    order = score.double().masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return among & (order.argsort(1) < size.unsqueeze(1))


class Sampler(NamedTuple):
    """An order, the arguments of `sample` it takes, and the field of TokenStats by which tokens are chosen if the order
    has more of them drawn than revealed."""

    order: Callable[[Canvas, Plan], Iterator[Step]]
    takes: tuple[str, ...]
    statistic: str = ""


# What is revealed first: where this field of TokenStats is largest.
RANKED = {"confidence": "probability", "margin": "margin", "entropy": "neg_entropy"}
_TIMED = Sampler(by_noise, ("steps", "schedule"))
SAMPLERS = {
    "tweedie": _TIMED,
    "euler": _TIMED,
    "ancestral": _TIMED,
    "first_hitting": Sampler(at_random, ()),
    **{name: Sampler(by_blocks, ("steps", "block_length"), statistic) for name, statistic in RANKED.items()},
    "random": Sampler(at_random, ("steps", "block_length")),
}
TIMED = tuple(name for name, sampler in SAMPLERS.items() if sampler is _TIMED)  # those that take scores too


class Network:
    """A model, its guidance, and how many sequences it was asked about."""

    def __init__(self, model: Model, guidance: float) -> None:
        self.body, self.lm_head, self.bias = model_parts(model)
        self.guidance, self.num_forwards = guidance, 0

    def __call__(self, xt: Tensor, *given: Tensor) -> Tensor:
        """Logits or scores [b, L, V], or hidden states [b, L, D] where the last layer is apart."""
        self.num_forwards += len(xt)
        what, width = ("logits", "V") if self.lm_head is None else ("last_hidden_state", "D")
        output = self.body(xt, *given)
        output = getattr(output, what, output)
        if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != xt.shape:
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"model: expected [{xt.shape[0]}, {xt.shape[1]}, {width}] numbers, got {came}")
        return output

    def tokens(self, xt: Tensor, free: Tensor, rows: Tensor, **options: Any) -> Any:
        """What `sample_tokens` draws for the sequences `rows`.

        A last layer apart is applied only where tokens are drawn.

        With guidance w, from un + (w + 1) (cond - un), un being what comes where the given tokens are masked too: of
        logits, or, since the last layer is linear, of hidden states.
        """
        if self.guidance:
            blank = xt.where(free, options["mask_index"])
            cond, un = self(torch.cat((xt, blank))).chunk(2)
            z = torch.lerp(un, cond, self.guidance + 1)
        else:
            z = self(xt)
        return draw_tokens(z, self.lm_head, self.bias, xt, sample_ids=rows, **options)


def draw_tokens(z: Tensor, lm_head: Tensor | None, bias: Tensor | None, xt: Tensor, **options: Any) -> Any:
    """`sample_tokens` of logits, or `linear_sample_tokens` of hidden states where the last layer is apart."""
    if lm_head is None:
        return sample_tokens(z, xt, **options)
    return linear_sample_tokens(z, lm_head, xt, bias=bias, **options)


def unmask(canvas: Canvas, network: Network, plan: Plan, sampler: Sampler, options: dict[str, Any]) -> Iterator[None]:
    """Fills the canvas from conditionals, a step at a time.

    The network is asked only about sequences that gain a token: the others would come to it again unchanged.
    """
    for number, where, size in sampler.order(canvas, plan):
        rows = where.any(1).nonzero().squeeze(1)
        if len(rows):
            xt, where = canvas.xt[rows], where[rows]
            names = dict(step=number, return_stats=bool(sampler.statistic))
            drawn = network.tokens(xt, canvas.free[rows], rows, mask=where, **names, **options)
            if sampler.statistic:
                tokens, stats = drawn
                drawn = tokens.where(largest(getattr(stats, sampler.statistic), where, size[rows]), xt)
            canvas.xt[rows] = drawn
        yield


def reverse(canvas: Canvas, network: Network, plan: Plan, options: dict[str, Any]) -> Iterator[None]:
    """Fills the canvas by reverse steps from what a network says of (xt, sigma), a step at a time."""
    for number, move in enumerate(plan.moves):
        moving = canvas.moving()
        rows = moving.any(1).nonzero().squeeze(1)
        if not len(rows):
            return
        xt = canvas.xt[rows]
        output = network(xt, torch.full((len(rows),), move.sigma, dtype=torch.float32, device=xt.device))
        drawn = move.draw(output, xt, step=number, sample_ids=rows, **options)
        canvas.xt[rows] = drawn.where(moving[rows], xt)
        yield
