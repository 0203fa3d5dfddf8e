import torch


def token_logps(logits, x0, *, mask=None, temperature=1.0, return_entropy=False, mask_index=-1, exclude_mask=True, ignore_index=-100, backend=None):
    z = (logits.float() if logits.dtype != torch.float64 else logits) / temperature
    if exclude_mask:
        at = torch.arange(z.shape[-1], device=z.device) == mask_index % z.shape[-1]
        z = z.masked_fill(at, -torch.inf)
    live = x0 != ignore_index
    if mask is not None:
        live = live & mask
    logp = z.log_softmax(-1)
    found = logp.gather(-1, x0.where(live, 0).unsqueeze(-1)).squeeze(-1)
    found = found.where(live, 0)
    if not return_entropy:
        return found
    h = -(logp.exp() * logp.masked_fill(logp.isneginf(), 0)).sum(-1)
    return found, h.where(live, 0)


def linear_token_logps(hidden, lm_head, x0, *, bias=None, softcap=0.0, capacity=None, group=None, **options):
    z = torch.nn.functional.linear(hidden, lm_head, bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return token_logps(z, x0, **options)
