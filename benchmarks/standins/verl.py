"""DARE: `_forward_micro_batch` of its actors, and what of an actor that needs."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations import verl
from standins import Case, Network, Problem, functions

DREAM = SimpleNamespace(model_type="Dream")


def _get_logits(self, model, packed_input, cu_seqlens, max_seqlen, **_):
    logits = model(packed_input, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen).logits
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    return shifted if self.actor_module.config is DREAM else logits


def _losses(actor: Any, batch: dict[str, Tensor], i: int) -> Tensor:
    """Cross-entropy of every token in pass i, [B, L]: logits go back to where their tokens were, row by row."""
    seen, x0, losses = batch["attention_mask"] == 1, batch["input_ids"], []
    ends = F.pad(seen.sum(1).cumsum(0), (1, 0)).int()
    xt = torch.cat([row[where] for row, where in zip(batch["perturbed_seq"][:, i], seen, strict=True)])[None]
    logits = _get_logits(actor, actor.actor_module, xt, ends, int(seen.sum(1).max()))
    for b, where in enumerate(seen):
        back = torch.zeros(x0.shape[1], logits.shape[-1], dtype=logits.dtype, device=logits.device)
        back[where] = logits[0, ends[b] : ends[b + 1]]
        losses.append(F.cross_entropy(back, x0[b], reduction="none"))
    return torch.stack(losses)


def _micro_batch(made: Callable[..., Tensor], actor: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    size, masked = batch["responses"].shape[1], batch["mask_indices"]
    logps = -torch.stack([_losses(actor, batch, i) for i in range(masked.shape[1])], 1)
    weighted = torch.where(masked, logps, 0) / batch["p_mask"].where(masked, 1)
    per_sample = weighted.sum(-1, keepdim=True) / size
    return made(logps, weighted, masked, size), per_sample.expand(-1, -1, size)


def _of_answers(logps: Tensor, weighted: Tensor, masked: Tensor, size: int) -> Tensor:
    return logps[..., -size:]


def _coupled(logps: Tensor, weighted: Tensor, masked: Tensor, size: int) -> Tensor:
    return (torch.where(masked[:, 0], logps[:, 0], 0) + weighted[:, 1] + weighted[:, 2]) / 2


def _of_tokens(logps: Tensor, weighted: Tensor, masked: Tensor, size: int) -> Tensor:
    return (weighted.sum(-1).mean(1) / size)[:, None].repeat(1, size)


def _of_sequences(logps: Tensor, weighted: Tensor, masked: Tensor, size: int) -> Tensor:
    return weighted.sum(-1).mean(1)[:, None].expand(-1, size)


STANDINS = {
    name: partial(_micro_batch, made)
    for name, made in dict(d1=_of_answers, coupled_grpo=_coupled, vrpo=_of_tokens, bgpo=_of_sequences).items()
}


def ours(name: str, actor: Any, batch: dict[str, Tensor], calculate_entropy: bool = False) -> Any:
    passes = (1, batch["mask_indices"].shape[1])
    arguments = passes if name == "vrpo" else (1.0, *passes)
    found = verl.ACTORS[name]._forward_micro_batch(actor, batch, *arguments, calculate_entropy=calculate_entropy)
    return found if calculate_entropy else found[1:]


def real(name: str) -> Callable[..., Any] | None:
    """`_forward_micro_batch` of the checkout, with a stand-in for what it calls."""
    file = f"verl/verl/workers/actor/llada_dp_actor_{name}.py"
    return functions(file, "_forward_micro_batch", torch=torch, F=F).get("_forward_micro_batch")


def micro_batch(p: Problem, passes: int = 3, padding: bool = True) -> dict[str, Tensor]:
    """The first half are prompts, with padding before some; the answers are masked: all, some, and the others."""
    (batch, length), answer = p.x0.shape, p.x0.shape[1] - p.x0.shape[1] // 2
    at = torch.arange(length)
    seen = at >= (torch.arange(batch) % (length - answer) * padding)[:, None]
    answers = (at >= length - answer).expand(batch, -1)
    some = (p.xt == p.mask_index) & answers
    some[:, -1], some[:, -2] = True, False
    masks = torch.stack([answers, some, answers & ~some][:passes], 1)
    xt = p.x0[:, None].where(~masks, p.mask_index)
    shares = torch.tensor([1, 0.5, 0.5])[:passes, None].expand(masks.shape) * masks
    said = dict(perturbed_seq=xt, mask_indices=masks, p_mask=shares, responses=p.x0[:, -answer:])
    return dict(input_ids=p.x0, attention_mask=seen.long(), **said)


class Packed(nn.Module):
    """A network that is called on sequences one after the other, [1, n]."""

    def __init__(self, network: Any, config: Any) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, input_ids: Tensor, **asked: Any) -> SimpleNamespace:
        return self.network(input_ids, **asked)

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self.network, "module", self.network).get_output_embeddings()


def actor(network: nn.Module, config: Any = None) -> Any:
    """With what its micro-batches need."""
    made = SimpleNamespace(actor_module=Packed(network, config), use_ulysses_sp=False, MASK_TOKEN_ID=None)
    made._get_logits = partial(_get_logits, made)
    return made


def cases(p: Problem) -> dict[str, Case]:
    weight = torch.linspace(-1, 1, p.x0.shape[1], dtype=torch.float64)

    def pair(name: str, config: Any = None) -> Case:
        def loss(function: Callable[..., Any], network: Network) -> Tensor:
            batch = micro_batch(p, 3 if name == "coupled_grpo" else 1)
            log_prob, per_sample = function(actor(network, config), {key: value[:1] for key, value in batch.items()})
            return (log_prob * weight[-log_prob.shape[-1] :]).sum() + per_sample.mean()

        return partial(loss, STANDINS[name]), partial(loss, partial(ours, name))

    return {name: pair(name) for name in STANDINS} | {"d1, Dream": pair("d1", DREAM)}
