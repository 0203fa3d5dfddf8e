"""Distributions over strings whose conditionals given any subset of the tokens are known exactly.

Each is a model in the sense of the estimators: ``oracle(xt)`` gives float64 logits [B, L, V], and where xt is
the mask their softmax over the other tokens is the true conditional. ``oracle.nll(x)`` is the truth to meet.
The mask's own column holds a large number, so that a softmax that fails to leave it out is seen at once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from dna import dna_strings, markov_transition
from torch import Tensor, nn

MASK_LOGIT = 9.0


class Oracle:
    """What the distributions share; a subclass gives ``logits`` and ``log_prob``."""

    mask_index: int

    def log_prob(self, xt: Tensor) -> Tensor:
        """log p of the tokens of xt that are not masked, the masked ones summed out: [B, L] -> [B]."""
        raise NotImplementedError

    def logits(self, xt: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, xt: Tensor) -> Tensor:
        logits = self.logits(xt)
        logits[..., self.mask_index] = MASK_LOGIT
        return logits

    def nll(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """-log p(x), or with a target [B, L] that of the target tokens given the others, in nats: [B]."""
        given = x.masked_fill(torch.ones_like(x).bool() if target is None else target, self.mask_index)
        return self.log_prob(given) - self.log_prob(x)

    def sample(self, num_samples: int, length: int, *, seed: int = 0) -> Tensor:
        """Strings [num_samples, length], drawn token after token from the conditionals."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.full((num_samples, length), self.mask_index)
        for i in range(length):
            logits = self.logits(x)[:, i].index_fill(1, torch.tensor(self.mask_index), -math.inf)
            x[:, i] = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        return x


@dataclass
class Mixture(Oracle):
    """sum_z w_z prod_i p_i(x_i | z). Columns of the mask hold no probability."""

    log_weights: Tensor  # [Z]
    log_probs: Tensor  # [Z, L, V]
    mask_index: int

    def _evidence(self, xt: Tensor) -> Tensor:
        """log w_z p(observed | z): [B, Z]."""
        seen = self.log_probs.gather(2, xt.T.expand(len(self.log_weights), -1, -1))  # [Z, L, B]
        return self.log_weights + seen.masked_fill(xt.T.eq(self.mask_index), 0).sum(1).T

    def log_prob(self, xt: Tensor) -> Tensor:
        return self._evidence(xt).logsumexp(1)

    def logits(self, xt: Tensor) -> Tensor:
        posterior = self._evidence(xt).softmax(1)  # [B, Z]
        return torch.einsum("bz,zlv->blv", posterior, self.log_probs.exp()).clamp_min(1e-300).log()


@dataclass
class MarkovChain(Oracle):
    """A first-order chain, by forward-backward. Token ids are 0..V-2, the mask is V-1."""

    initial: Tensor  # [V-1]
    transition: Tensor  # [V-1, V-1], rows sum to 1

    def __post_init__(self) -> None:
        self.mask_index = len(self.initial)

    def _evidence(self, xt: Tensor) -> list[Tensor]:
        """1 for each state that agrees with xt, else 0: [B, V-1] per position."""
        states = torch.arange(self.mask_index)
        return list(((states == xt.unsqueeze(2)) | (self.mask_index == xt.unsqueeze(2))).double().unbind(1))

    def _forward(self, xt: Tensor) -> tuple[list[Tensor], Tensor]:
        """p(x_i | observed before i), [B, V-1] per position, and log p(observed), [B]."""
        before, log_prob = [self.initial.expand(len(xt), -1)], torch.zeros(len(xt), dtype=torch.float64)
        for evidence in self._evidence(xt):
            reached = before[-1] * evidence
            total = reached.sum(1, keepdim=True)
            log_prob = log_prob + total.squeeze(1).log()
            before.append(reached / total @ self.transition)
        return before[:-1], log_prob

    def log_prob(self, xt: Tensor) -> Tensor:
        return self._forward(xt)[1]

    def logits(self, xt: Tensor) -> Tensor:
        before, _ = self._forward(xt)
        after = [torch.ones_like(before[0])]  # p(observed after i | x_i), up to a factor
        for evidence in self._evidence(xt)[:0:-1]:
            message = (after[-1] * evidence) @ self.transition.T
            after.append(message / message.sum(1, keepdim=True))
        joint = torch.stack(before, 1) * torch.stack(after[::-1], 1)
        return torch.nn.functional.pad(joint.log(), (0, 1))


class OrderMarkov(MarkovChain):
    """A chain of any order k: initial [A^k], transition [A^k, A]. Token ids are 0..A-1, the mask is A.

    The context of a place is the k letters before it, as a number of k digits in base A, the oldest first. The
    letters before a string are never seen; `initial` is the distribution of this context of its first place.
    """

    def __post_init__(self) -> None:
        self.mask_index = self.transition.shape[1]

    def _forward(self, xt: Tensor) -> tuple[list[Tensor], Tensor]:
        """p(context of i | observed before i), [B, A^k] per position, and log p(observed), [B]."""
        before, log_prob = [self.initial.expand(len(xt), -1)], torch.zeros(len(xt), dtype=torch.float64)
        for evidence in self._evidence(xt):
            reached = before[-1].unsqueeze(2) * (self.transition * evidence.unsqueeze(1))  # [B, A^k, A]
            reached = reached.view(len(xt), self.mask_index, -1).sum(1)  # the oldest letter is summed out
            total = reached.sum(1, keepdim=True)
            log_prob = log_prob + total.squeeze(1).log()
            before.append(reached / total)
        return before[:-1], log_prob

    def logits(self, xt: Tensor) -> Tensor:
        before, _ = self._forward(xt)
        after, columns = torch.ones_like(before[0]), []  # p(observed from i on | context of i), up to a factor
        for seen, evidence in zip(before[::-1], self._evidence(xt)[::-1], strict=True):
            ahead = self.transition * after.repeat(1, self.mask_index).view(len(xt), -1, self.mask_index)
            columns.append((seen.unsqueeze(1) @ ahead).squeeze(1))
            after = (ahead @ evidence.unsqueeze(2)).squeeze(2)
            after = after / after.sum(1, keepdim=True)
        return torch.nn.functional.pad(torch.stack(columns[::-1], 1).log(), (0, 1))


@dataclass
class Blocks:
    """What a block model gives that sees of an oracle, or a network, the blocks before and xt of a position's own."""

    model: Any  # with a mask_index
    block_length: int

    def __call__(self, xt: Tensor, x0: Tensor) -> Tensor:
        parts = []
        for start in range(0, xt.shape[1], self.block_length):
            end = start + self.block_length
            seen = torch.cat([x0[:, :start], xt[:, start:end]], 1)
            unseen = seen.new_full((len(xt), xt.shape[1] - seen.shape[1]), self.model.mask_index)
            parts.append(self.model(torch.cat([seen, unseen], 1))[:, start:end])
        return torch.cat(parts, 1)


@dataclass
class AbsorbingScores:
    """The true scores of an oracle whose mask is the last state; keeps the noise it was asked about."""

    oracle: Oracle
    parametrization: str = "log_score"
    asked: list[Tensor] = field(default_factory=list)

    def __call__(self, xt: Tensor, sigma: Tensor) -> Tensor:
        self.asked.append(sigma)
        logits = self.oracle(xt)
        if self.parametrization == "logits":
            return logits
        log_c, num_states = logits[..., :-1].log_softmax(2), logits.shape[2]
        log_e1 = sigma.double().expm1().log().view(-1, 1, 1)
        tail = {"log_score": -log_e1, "scale_by_sigma": math.log(num_states - 1)}[self.parametrization]
        return nn.functional.pad(log_c + tail, (0, 1))


@dataclass
class UniformScores:
    """The true scores p_sigma(x with another token) / p_sigma(x) of a mixture of products, noised uniformly.

    Such a mixture stays one: each factor p becomes alpha p + (1 - alpha) / N.
    """

    mixture: Mixture
    asked: list[Tensor] = field(default_factory=list)

    def __call__(self, xt: Tensor, sigma: Tensor) -> Tensor:
        self.asked.append(sigma)
        p = self.mixture.log_probs.exp()[..., :-1]  # without the mask
        alpha = torch.exp(-sigma.double()).view(-1, 1, 1, 1)
        p = alpha * p + (1 - alpha) / p.shape[2]  # [b, Z, L, N]
        seen = p.gather(3, xt[:, None, :, None].expand(-1, p.shape[1], -1, 1)).squeeze(3)
        posterior = (self.mixture.log_weights + seen.log().sum(2)).softmax(1)
        return torch.einsum("bz,bzlv->blv", posterior, p / seen.unsqueeze(3)).log()


def mixture(length: int, num_tokens: int, components: int = 3, mask_index: int = -1, seed: int = 0) -> Mixture:
    """A random mixture over num_tokens tokens and the mask, which may sit anywhere among the ids."""
    generator = torch.Generator().manual_seed(seed)
    mask_index %= num_tokens + 1
    logits = 1.5 * torch.randn(components, length, num_tokens + 1, dtype=torch.float64, generator=generator)
    logits[..., mask_index] = -math.inf
    weights = torch.randn(components, dtype=torch.float64, generator=generator)
    return Mixture(weights.log_softmax(0), logits.log_softmax(2), mask_index)


def markov_chain(num_tokens: int, *, seed: int = 0, sharpness: float = 2.0) -> MarkovChain:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(num_tokens + 1, num_tokens, dtype=torch.float64, generator=generator)
    return MarkovChain(logits[0].softmax(0), logits[1:].softmax(1))


def skewed_chain() -> MarkovChain:
    """Two letters that seldom change: most strings' losses are tiny but for a few masks, so nothing is near normal."""
    initial, transition = torch.tensor([0.5, 0.5]), torch.tensor([[0.98, 0.02], [0.03, 0.97]])
    return MarkovChain(initial.double(), transition.double())


class Tabled:
    """The logits of a model on all strings of one length, made once, for tests that ask it very often."""

    def __init__(self, model: Oracle, length: int) -> None:
        self.mask_index, base = model.mask_index, model.mask_index + 1
        self.powers = base ** torch.arange(length)
        strings = torch.arange(base**length).unsqueeze(1) // self.powers % base
        self.table = model(strings)

    def __call__(self, xt: Tensor) -> Tensor:
        return self.table[xt @ self.powers]


def order_markov(order: int, num_tokens: int = 4, *, seed: int = 0, sharpness: float = 1.5) -> OrderMarkov:
    """What `dna.markov_strings` draws from the random chain of `dna.markov_transition`."""
    transition = markov_transition(order, seed=seed, num_letters=num_tokens, sharpness=sharpness)
    return OrderMarkov(torch.full((num_tokens**order,), num_tokens**-order, dtype=torch.float64), transition)


def dna_toy(seed: int = 0) -> tuple[Mixture, Tensor]:
    """128 distinct strings of length 8 over ACGT, p proportional to exp(u / 0.5), u uniform: oracle, strings.

    A mixture of point masses: its conditionals count the strings that agree with what is seen. A token none
    of them has gets probability 1e-300, which keeps logits finite.
    """
    strings, p = dna_strings(seed)
    points = torch.nn.functional.one_hot(strings, 5).double()
    return Mixture(p.log(), points.clamp_min(1e-300).log(), mask_index=4), strings
