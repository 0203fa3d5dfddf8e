"""What the guides take as given, beside what they import: networks, tokens and files, as small as will do."""

import copy
from pathlib import Path

import torch

import fastdiff
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.blocks import block_causal

M = 256


def network(num_states: int = M + 1, length: int = 64, cond_dim: int = 0) -> DiffusionTransformer:
    torch.manual_seed(0)
    return DiffusionTransformer(ModelConfig(num_states, length, 16, 1, 2, cond_dim))


def generating() -> dict:
    model, infill = network(), torch.randint(M, (16,))
    infill[4:12] = -1

    def block_causal_model(xt):
        return model(xt, sees=block_causal(xt.shape[1], 16))

    return dict(model=model, M=M, prompt=infill[:4], infill=infill, EOS=0, block_causal_model=block_causal_model)


def post_training() -> dict:
    model, tokens = network(6, 8), torch.randint(5, (3, 4, 8))
    better, worse, x0 = tokens
    target = torch.arange(8).expand(4, 8) >= 3
    better[~target] = worse[~target]  # prompts
    given = dict(model=model, reference=copy.deepcopy(model), better=better, worse=worse, x0=x0, target=target)
    return given | dict(mask_index=5, step=3, advantages=torch.tensor([1.0, -1.0, 0.5, 0.0]))


def other_noise() -> dict:
    model, x0 = network(6, 256, cond_dim=8), torch.randint(5, (4, 256))
    return dict(vars(fastdiff), model=model, x0=x0, V=6, M=5, seed=0, step=0)


def last_layers() -> dict:
    x0, masked, lm_head = torch.randint(M, (2, 8)), torch.arange(16).view(2, 8) % 3 > 0, network().lm_head
    given = dict(hidden=torch.randn(2, 8, 16), lm_head=lm_head, x0=x0, xt=x0.where(~masked, M), weight=torch.ones(2))
    given |= dict(sigma=torch.ones(2), dsigma=torch.ones(2), answer=masked, masked=masked, advantage=torch.ones(2, 8))
    given |= dict(logits=torch.randn(2, 8, M + 1), teacher_logits=torch.randn(2, 8, M + 1), teacher=network())
    log_p, ids = torch.randn(2, 8, M + 1).log_softmax(-1).topk(4)
    given |= dict(teacher_hidden=torch.randn(2, 8, 16), log_p=log_p, ids=ids)
    return dict(vars(fastdiff)) | given | dict(lm_head_part=lm_head.weight, group=None)


def at_scale() -> dict:
    model = network(length=32)

    def body(tokens, positions, sees):
        return model.body(tokens, positions=positions, sees=sees)

    return dict(network=body, lm_head=model.lm_head.weight, x0=torch.randint(M, (2, 32)), M=M, L=32, step=0)


def data() -> dict:
    Path("corpus").mkdir()
    for k in range(400):
        Path(f"corpus/{k}.txt").write_text(f"This is text {k}. " * 10)
    return {}


GIVEN = {
    "training.md": dict,
    "sampling.md": generating,
    "post_training.md": post_training,
    "noise.md": other_noise,
    "linear_losses.md": last_layers,
    "training_at_scale.md": at_scale,
    "training_data.md": data,
}
