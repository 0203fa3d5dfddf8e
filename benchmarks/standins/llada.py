"""LLaDA: the losses of its guideline, its likelihood and its sampler."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations import llada
from standins import Network, Problem, published


def pretraining_loss(
    model: Any, noisy_batch: Tensor, input_ids: Tensor, masked_indices: Tensor, p_mask: Tensor
) -> Tensor:
    """Masked rows are gathered; each loss over its p_mask; B L tokens."""
    logits = model(input_ids=noisy_batch).logits
    rows = logits[masked_indices]
    losses = F.cross_entropy(rows, input_ids[masked_indices], reduction="none") / p_mask[masked_indices]
    return losses.sum() / input_ids.numel()


def sft_loss(
    model: Any,
    noisy_batch: Tensor,
    input_ids: Tensor,
    masked_indices: Tensor,
    p_mask: Tensor,
    answer_lengths: Tensor,
) -> Tensor:
    """The same, over the answer's length, and B sequences."""
    logits = model(input_ids=noisy_batch).logits
    rows = logits[masked_indices]
    losses = F.cross_entropy(rows, input_ids[masked_indices], reduction="none") / p_mask[masked_indices]
    return (losses / answer_lengths[masked_indices]).sum() / len(input_ids)


def _guided(model: Any, xt: Tensor, given: Tensor, cfg_scale: float, mask_id: int, attention_mask: Any) -> Tensor:
    options = {} if attention_mask is None else dict(attention_mask=attention_mask)
    if cfg_scale == 0:
        return model(xt, **options).logits
    options = {name: value.repeat(2, 1) for name, value in options.items()}
    cond, un = model(torch.cat([xt, torch.where(given, mask_id, xt)]), **options).logits.chunk(2)
    return un + (cfg_scale + 1) * (cond - un)


def get_log_likelihood(model, prompt, answer, mc_num=128, batch_size=16, cfg_scale=0.0, mask_id=126336):
    """Counts at equal distances from a random start, rounded; one batch of them at a time."""
    x0 = torch.cat([prompt, answer]).expand(batch_size, -1)
    given, length, losses = torch.arange(x0.shape[1]) < len(prompt), len(answer), []
    for _ in range(mc_num // batch_size):
        first = int(torch.randint(1, length + 1, ()))
        counts = (first + torch.arange(batch_size) * (length / batch_size)).round().long()
        counts = (counts - 1) % length + 1
        chosen = torch.rand(batch_size, length).argsort(1).argsort(1) < counts[:, None]
        xt = torch.where(F.pad(chosen, (len(prompt), 0)), mask_id, x0)
        masked, ratio = xt == mask_id, (counts / length)[:, None].expand_as(xt)
        logits = _guided(model, xt, given, cfg_scale, mask_id, None)
        loss = F.cross_entropy(logits[masked], x0[masked], reduction="none") / ratio[masked]
        losses.append(loss.sum().item() / batch_size)
    return -sum(losses) / len(losses)


@torch.no_grad()
def generate(
    model,
    prompt,
    attention_mask=None,
    steps=128,
    gen_length=128,
    block_length=128,
    temperature=0.0,
    cfg_scale=0.0,
    remasking="low_confidence",
    mask_id=126336,
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
):
    """Gumbel noise in float64 over [B, L, V]; then a softmax over it for the confidences."""
    eos, eot, first = 126081, 126348, prompt.shape[1]
    x = F.pad(prompt, (0, gen_length), value=mask_id)
    given = x != mask_id
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, gen_length), value=1)
    steps //= gen_length // block_length
    for start in range(first, first + gen_length, block_length):
        masks = (x[:, start : start + block_length] == mask_id).sum(1)
        for i in range(steps):
            masked = x == mask_id
            logits = _guided(model, x, given, cfg_scale, mask_id, attention_mask)
            if logits_eos_inf:
                logits[..., eos] = -torch.inf
            noisy = logits
            if temperature > 0:
                noisy = logits.double().exp() / (-torch.rand_like(logits, dtype=torch.float64).log()) ** temperature
            x0 = noisy.argmax(-1)
            if confidence_eos_eot_inf:
                noisy[..., eos] = -torch.inf  # of the logits, where there is no noise
                logits[..., eot] = -torch.inf
            if remasking == "low_confidence":
                surest = torch.softmax(logits, -1).gather(-1, x0[..., None]).squeeze(-1)
            else:
                surest = torch.rand(x0.shape)
            surest[:, start + block_length :] = -torch.inf
            surest = torch.where(masked, surest, -torch.inf)
            for row, count in enumerate((masks // steps + (i < masks % steps)).tolist()):
                best = surest[row].topk(count).indices
                x[row, best] = torch.where(masked, x0, x)[row, best]
    return x


PUBLISHED = published("llada", "generate", "get_log_likelihood")
get_log_likelihood = PUBLISHED["get_log_likelihood"].get_log_likelihood
generate = PUBLISHED["generate"].generate


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    p_mask = p.t.float()[:, None].expand(p.x0.shape)
    masked, prompt_lengths = p.xt == p.mask_index, torch.arange(len(p.x0)) % p.x0.shape[1]
    answer = torch.arange(p.x0.shape[1]) >= prompt_lengths[:, None]
    pretraining = (p.xt, p.x0, masked, p_mask)
    sft = (p.xt, p.x0, masked & answer, p_mask, answer.sum(1, keepdim=True).expand(p.x0.shape))

    def pair(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], arguments: tuple[Tensor, ...]):
        return lambda network: theirs(network, *arguments), lambda network: ours(network, *arguments)

    return {
        "pretraining": pair(pretraining_loss, llada.pretraining_loss, pretraining),
        "SFT": pair(sft_loss, llada.sft_loss, sft),
    }
