"""dFactory: the loss in the training step of LLaDA2.0, which is not a function but lines of its task."""

import ast
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations import dfactory
from standins import Network, Problem

CHECKOUT = Path(os.environ.get("FASTDIFF_CHECKOUTS", "/nowhere")).resolve() / "dfactory"
TASK = CHECKOUT / "tasks/train_llada2_bd.py"


def train_llada2_loss(
    model: Any, micro_batch: dict[str, Any], labels: Tensor, same_token_labels: bool = False
) -> Tensor:
    """Logits of both halves; every row of the first is scored, those without a label for nothing."""
    length = labels.shape[1]
    logits = model(**micro_batch, use_cache=False, output_router_logits=False).logits[:, :length].contiguous()
    if not same_token_labels:
        logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.sum() / (labels != -100).sum()


def _of_the_task(model: Any, micro_batch: dict[str, Any], labels: Tensor, same_token_labels: bool = False) -> Tensor:
    """The same by the lines of the task."""
    block = next(
        node
        for node in ast.walk(ast.parse(TASK.read_text()))
        if isinstance(node, ast.With) and ast.unparse(node.items[0]) == "model_fwd_context"
    )
    in_blocks = labels.shape != micro_batch["input_ids"].shape
    options = SimpleNamespace(block_diffusion_mode=in_blocks, same_token_labels=same_token_labels)
    names = dict(torch=torch, model=model, micro_batch=micro_batch, labels=labels, noisy_input_ids=labels)
    names |= dict(args=SimpleNamespace(train=options), micro_batches=[micro_batch])
    exec(compile(ast.Module(block.body, []), str(TASK), "exec"), names)
    return names["loss"]


if TASK.exists():
    train_llada2_loss = _of_the_task


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    labels = torch.where(p.xt == p.mask_index, p.x0, -100)
    both = dict(input_ids=torch.cat([p.xt, p.x0], 1))

    def pair(micro_batch: dict[str, Any], same_token_labels: bool):
        arguments = (micro_batch, labels, same_token_labels)
        return (
            lambda network: train_llada2_loss(network, *arguments),
            lambda network: dfactory.train_llada2_loss(network, *arguments),
        )

    return {
        "blocks": pair(both, True),
        "blocks, shifted": pair(both, False),
        "whole sequences": pair(dict(input_ids=p.xt), True),
    }
