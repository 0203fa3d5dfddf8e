"""The losses and masks as the published codebases compute them: the formulas, in plain PyTorch, gradients by autograd.

z [B, L, V] is what the network gives; x0, xt [B, L]; sigma, sigma_s, dsigma, rate and share [B]; the mask is V - 1.
Each loss is a sum.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sedd_absorb(z: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """SEDD's score entropy of the absorbing graph: masked rows are gathered, then exponentiated and summed."""
    masked = xt == z.shape[-1] - 1
    e1 = torch.where(sigma < 0.5, torch.expm1(sigma), torch.exp(sigma) - 1)
    ratio = (1 / e1)[:, None].expand_as(xt)[masked]
    negative = ratio * z[masked].gather(-1, x0[masked][:, None]).squeeze(-1)
    positive = z[masked][:, :-1].exp().sum(-1)
    entropy = z.new_zeros(xt.shape)
    entropy[masked] += (positive - negative + ratio * (ratio.log() - 1)).to(z.dtype)
    return entropy.sum()


def sedd_uniform(z: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """SEDD's score entropy of the uniform graph: three reductions over [B, L, V]."""
    n, same = z.shape[-1], xt == x0
    e1 = torch.where(sigma < 0.5, torch.expm1(sigma), torch.exp(sigma) - 1)[:, None]
    ratio = 1 - n / (e1 + n)
    at_xt, at_x0 = (z.gather(-1, x[..., None]).squeeze(-1) for x in (xt, x0))
    negative = z.mean(-1) - at_xt / n
    negative = torch.where(same, ratio * negative, at_x0 / e1 + negative)
    still = (n - 1) / n * ratio * (ratio.log() - 1)
    constant = torch.where(same, still, ((-ratio.log() - 1) / ratio - (n - 2)) / n)
    score = z.exp()
    positive = score.mean(-1) - score.gather(-1, xt[..., None]).squeeze(-1) / n
    return (positive - negative + constant).sum()


def mdlm_subs(z: Tensor, rate: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """MDLM's SUBS parametrisation, then the weighted log-likelihood of x0."""
    mask_index = z.shape[-1] - 1
    offset = z.new_zeros(mask_index + 1)
    offset[mask_index] = -1e6
    z = z + offset
    log_p = z - torch.logsumexp(z, -1, keepdim=True)
    clean = xt != mask_index
    log_p[clean] = -1e6
    log_p[clean, xt[clean]] = 0
    return -(log_p.gather(-1, x0[..., None]).squeeze(-1) * rate[:, None]).sum()


def radd_lambda(z: Tensor, rate: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """RADD's lambda-DCE: log-probabilities without the mask at every position, those of masked ones kept."""
    log_p = F.log_softmax(z[..., :-1].float(), -1)
    loss = -log_p.gather(-1, x0[..., None]).squeeze(-1) * (xt == z.shape[-1] - 1)
    return (loss.double() * rate[:, None]).sum()


def llada_ce(z: Tensor, rate: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """LLaDA's guideline: cross_entropy on the indexed masked rows, over all of V, divided by the mask probability."""
    masked = xt == z.shape[-1] - 1
    loss = F.cross_entropy(z[masked], x0[masked], reduction="none")
    return (loss * rate[:, None].expand_as(xt)[masked]).sum()


def duo_nelbo(z: Tensor, sigma: Tensor, dsigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """Duo's uniform-state NELBO from logits: V alpha c + (1 - alpha) for every token, then its logarithm."""
    n, alpha, same = z.shape[-1], torch.exp(-sigma)[:, None], (x0 == xt).to(z.dtype)
    marginal = n * alpha[..., None] * F.log_softmax(z, -1).exp() + 1 - alpha[..., None]
    at_xt, at_x0 = (marginal.gather(-1, x[..., None]).squeeze(-1) for x in (xt, x0))
    floor = (1 - alpha) / (n * alpha + 1 - alpha)
    first = n * (1 / (n * alpha * same + 1 - alpha) - 1 / at_xt)
    second = -(same * floor + 1 - same) * (marginal.log().sum(-1) - n * at_xt.log())
    second = second - n * alpha / (1 - alpha) * (at_x0.log() - at_xt.log()) * (1 - same)
    second = second + ((n - 1) * floor * same - (1 - same) / floor) * floor.log()
    return (dsigma[:, None] / n * (second - first)).sum()


def squared_ratios(z: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor, uniform: bool) -> Tensor:
    """Concrete score matching as it is defined: the ratios of p(y | x0) made, taken off the scores, squared."""
    n, alpha, mask = (
        z.shape[-1],
        torch.exp(-sigma)[:, None, None],
        torch.arange(z.shape[-1], device=z.device) == z.shape[-1] - 1,
    )
    clean = F.one_hot(x0, n).to(z.dtype)
    p = alpha * clean + (1 - alpha) * (1 / n if uniform else mask.to(z))
    off = z.exp() - p / p.gather(-1, xt[..., None])
    off = off.scatter(-1, xt[..., None], 0)
    loss = off.square().sum(-1) / 2
    return (loss if uniform else loss * (xt == n - 1)).sum()


def diffusion_gemma(z: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """TRL's loss of DiffusionGemma: logits in float32, raised at x_t, cross_entropy over them."""
    alpha = torch.exp(-sigma)[:, None]
    bump = torch.log1p(z.shape[-1] * alpha / (1 - alpha)).expand(xt.shape)
    logits = z.float() if z.dtype.itemsize < 4 else z
    logits = logits.scatter_add(-1, xt[..., None], bump[..., None].to(logits.dtype))
    return F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="sum")


def d3pm_uniform(z: Tensor, sigma: Tensor, sigma_s: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """D3PM's divergence: logits of both posteriors from one-hot x0 and from softmax(z), then the KL of those."""
    n, tiny = z.shape[-1], 1e-6 if z.dtype != torch.float64 else 1e-300
    alpha_s, step = (torch.exp(-s)[:, None, None] for s in (sigma_s, sigma - sigma_s))
    came = step * F.one_hot(xt, n) + (1 - step) / n

    def posterior(c: Tensor) -> Tensor:
        return (came + tiny).log() + (alpha_s * c + (1 - alpha_s) / n + tiny).log()

    q, p = (F.log_softmax(posterior(c), -1) for c in (F.one_hot(x0, n).to(z), torch.softmax(z, -1)))
    return (q.exp() * (q - p)).sum()


def gidd(z: Tensor, sigma: Tensor, share: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """GIDD: the laws of x_t from one-hot x0 and from softmax(z), their logarithms, kl_div, and x_t's ratio."""
    n, alpha = z.shape[-1], torch.exp(-sigma)[:, None, None].to(z)
    mask = torch.arange(n, device=z.device) == n - 1
    share = share[:, None, None].to(z)
    noise = (1 - alpha) * torch.where(mask, 1 - share, share / (n - 1))
    z = z.masked_fill(mask, torch.finfo(z.dtype).min)
    log_q, log_p = ((alpha * c + noise).log().clip(min=-1e6) for c in (F.one_hot(x0, n).to(z), z.softmax(-1)))
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    log_ratio = (log_q - log_p).gather(-1, xt[..., None]).squeeze(-1)
    return (kl + log_ratio.exp() - log_ratio - 1).sum()


def masked_tokens(x0: Tensor, p: Tensor, mask_index: int) -> Tensor:
    """A uniform for each token, compared and replaced."""
    move = torch.rand(x0.shape, device=x0.device) < p[:, None]
    return torch.where(move, mask_index, x0)


def harmonic(x0: Tensor, mask_index: int) -> tuple[Tensor, Tensor, float]:
    """Counts by multinomial, subsets by sorting a uniform for each token."""
    length = x0.shape[1]
    law = 1 / torch.arange(1, length + 1, device=x0.device)
    counts = 1 + torch.multinomial(law, len(x0), replacement=True)
    rank = torch.rand(x0.shape, device=x0.device).argsort(1).argsort(1)
    mask = rank < counts[:, None]
    return torch.where(mask, mask_index, x0), mask, float(law.sum())


def llada_step(z: Tensor, xt: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """LLaDA's tokens at the masks and their confidence: Gumbel noise and a softmax in float64 over [B, L, V]."""
    wide = z.double()
    gumbel = (-torch.rand_like(wide).log()) ** temperature
    tokens = (wide.exp() / gumbel).argmax(-1)
    confidence = torch.softmax(wide, -1).gather(-1, tokens[..., None]).squeeze(-1)
    masked = xt == z.shape[-1] - 1
    return torch.where(masked, tokens, xt), torch.where(masked, confidence, -torch.inf)


def sedd_probs(z: Tensor, xt: Tensor, d_sigma: float) -> Tensor:
    """SEDD's analytic step, absorbing: the staggered score times the transposed transition, not normalised."""
    last = z.shape[-1] - 1
    score, decay = z.exp(), math.exp(-d_sigma)
    extra = (1 - 1 / decay) * score.sum(-1)
    score = score / decay
    score[..., last] += extra
    return score * (decay * F.one_hot(xt, last + 1) + torch.where(xt == last, 1 - decay, 0)[..., None])


def sedd_analytic(z: Tensor, xt: Tensor, d_sigma: float) -> Tensor:
    """Its tokens, by noise over [B, L, V]."""
    probs = sedd_probs(z, xt, d_sigma)
    return (probs / (1e-10 - (torch.rand_like(probs) + 1e-10).log())).argmax(-1)
