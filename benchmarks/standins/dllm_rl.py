"""dLLM-RL: `forward_process` of its scripts, which are given the model and the configuration around them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations.dllm_rl import masked_logps
from standins import Case, Problem, functions

CONFIG = SimpleNamespace(training=SimpleNamespace(eps=0.2, beta=0.1, use_kl_estimator_k3=True))


def _token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).gather(-1, labels[..., None]).squeeze(-1)


def _surrogate(
    new: Tensor, old: Tensor, mask: Tensor, adv: Any, count: Tensor | int, clip: float = torch.inf
) -> Tensor:
    """The clipped surrogate over `count` tokens of a sequence, and the k3 estimate of a KL, over B."""
    training = CONFIG.training
    adv, ratio = torch.as_tensor(adv)[:, None], (new - old).where(mask, 0).clamp(-clip, clip).exp()
    kept = torch.minimum(ratio * adv, ratio.clamp(1 - training.eps, 1 + training.eps) * adv)
    gained = ((kept * mask).sum(1) / count).sum()
    difference = (new - old).where(mask, 0)
    kl = (((-difference).clamp(-clip, clip).exp() - 1 + difference) * mask).sum(1)
    kl = kl if clip == torch.inf else kl / count
    return (training.beta * kl.sum() - gained) / len(new)


def llada(model: Any, input_ids: Tensor, labels: Tensor, p_mask_lm: Tensor, adv: Any, logp_old_tok: Tensor) -> Tensor:
    """Every row is scored; those of tokens that are not masked weigh 0."""
    new = _token_logps(model(input_ids).logits, labels.where(labels != -100, 0))
    return _surrogate(new, logp_old_tok, p_mask_lm, adv, p_mask_lm.sum(1).clamp(min=1))


def dream(model: Any, input_ids: Tensor, labels: Tensor, p_mask_lm: Tensor, adv: Any, logp_old_tok: Tensor) -> Tensor:
    """The logits at i predict token i + 1."""
    new = _token_logps(model(input_ids).logits[:, :-1], labels[:, 1:].where(labels[:, 1:] != -100, 0))
    mask = p_mask_lm[:, 1:]
    return _surrogate(new, logp_old_tok, mask, adv, mask.sum(1).clamp(min=1))


def sdar(
    model: Any, input_ids: Tensor, labels: Tensor, p_mask_lm: Tensor, adv: Any, logp_old_tok: Tensor, start_pos: int
) -> Tensor:
    """Prompt, answer, and the answer noised: logits of the first and the last are kept."""
    shown = labels.shape[1] - start_pos
    logits = model(input_ids).logits
    logits = torch.cat([logits[:, :start_pos], logits[:, start_pos + shown :]], dim=1)
    return _surrogate(_token_logps(logits, labels), logp_old_tok, p_mask_lm, adv, shown, clip=10)


def ours(
    model: Any, input_ids: Tensor, labels: Tensor, p_mask_lm: Tensor, adv: Any, logp_old_tok: Tensor, **options: Any
) -> Tensor:
    """The same by `masked_logps`."""
    new = masked_logps(model, labels, p_mask_lm, input_ids=input_ids, **options)
    mask = p_mask_lm[:, 1:] if options.get("shift") else p_mask_lm
    if "start_pos" in options:
        return _surrogate(new, logp_old_tok, mask, adv, labels.shape[1] - options["start_pos"], clip=10)
    return _surrogate(new, logp_old_tok, mask, adv, mask.sum(1).clamp(min=1))


def real(script: str, **known: Any) -> Callable[..., Tensor] | None:
    """`forward_process` of a script among the checkouts."""
    known = dict(torch=torch, F=F, config=CONFIG) | known
    return functions(f"dllm_rl/train/rl_{script}.py", "forward_process", **known).get("forward_process")


def cases(p: Problem) -> dict[str, Case]:
    start = 2
    mask = p.xt == p.mask_index
    mask[:, :start], mask[:, start] = False, True
    labels, adv, old = p.x0.where(mask, -100), torch.linspace(-1, 1, len(p.x0)), torch.full(p.x0.shape, -3.0).double()
    twice = torch.cat([p.x0, p.xt[:, start:]], 1)

    def pair(published: Any, xt: Tensor, labels: Tensor, old: Tensor, said: dict[str, Any], **options: Any) -> Case:
        arguments = xt, labels, mask, adv, old
        return (
            lambda network: published(network, *arguments, **said),
            lambda network: ours(network, *arguments, **said, **options),
        )

    return {
        "LLaDA": pair(llada, p.xt, labels, old, {}),
        "Dream": pair(dream, p.xt, labels, old[:, 1:], {}, shift=True),
        "SDAR": pair(sdar, twice, p.x0, old, dict(start_pos=start)),
    }
