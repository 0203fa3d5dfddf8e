"""Run by torchrun with names of functions: a model trained by torchtitan and by this package from the same weights."""

import tempfile
from functools import partial

import torch
import torch.distributed as dist
import torchrun
import torchtitan_on_cpu  # noqa: F401  # before torchtitan
from torch import nn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan_ranks import BATCH, L, M, V, config_of, rows, whole

from fastdiff.model import ModelConfig
from fastdiff.training import TrainConfig, train

BETAS = (0.9, 0.98)


class Llama(nn.Module):
    """torchtitan's model as the trainer of this package calls one."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, ModelConfig(V, L)
        self.blocks, self.lm_head = list(network.layers.values()), network.lm_head

    def forward(self, xt):
        return self.network(xt, positions=torch.arange(L).expand(xt.shape))


class Labels:
    """The tokens that torchtitan's loader asks for, as sequences."""

    num_tokens = M

    def sequences(self, start, stop):
        first = start % BATCH
        return rows(start // BATCH, unlabelled=0)[1][first : first + stop - start]


def torchtitan_config(folder, run):
    """A run's settings in torchtitan's words."""
    adamw = partial(ParamGroupConfig, optimizer_name="AdamW")
    kwargs = {"lr": run.lr, "betas": BETAS, "weight_decay": run.weight_decay}
    groups = [adamw(pattern="norm", optimizer_kwargs=kwargs | {"weight_decay": 0.0})]
    groups.append(adamw(pattern=".*", optimizer_kwargs=kwargs))
    config = config_of(folder, BATCH // 2, {"spmd_backend": "partial_dtensor"}, "float32", run.steps)
    config.dataloader.unlabelled, config.validator.enable = 0.0, False
    config.optimizer = OptimizersContainer.Config(param_groups=groups)
    config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=run.warmup, decay_ratio=0.0)
    config.training.max_norm = run.grad_clip
    return config


def same_curve():
    """20 steps in two accumulated parts on one rank, or on two ranks: FSDP2's there, DDP's here."""
    parts = 2 // dist.get_world_size()
    settings = dict(lr=3e-3, warmup=5, weight_decay=0.1, seed=3)
    run = TrainConfig("dce-t", steps=20, batch_size=BATCH, accumulation=parts, eval_every=0, **settings)
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = torchtitan_config(folder, run)
        trainer, network = config.build(), config.model_spec.model.build()
        network.init_weights()
        for name, p in trainer.model_parts[0].named_parameters():
            name = name.replace("_checkpoint_wrapped_module.", "")
            network.get_parameter(name).data.copy_(whole(p.detach(), p))
        trainer.metrics_processor.log = lambda step, loss, *args, **kwargs: theirs.append(loss)
        trainer.train()
        trainer.close()
        dist.barrier()  # before files go
    train(run, Llama(network), Labels(), callback=lambda record: ours.append(record["loss"]))
    if dist.get_rank() == 0:  # where records are told
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


if __name__ == "__main__":
    torchrun.run(globals())
