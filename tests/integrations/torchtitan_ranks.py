"""Run by torchrun with names of functions: torchtitan's trainer on ranks, each step against one process."""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchrun
import torchtitan_on_cpu  # noqa: F401  # before torchtitan
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.models.llama3 import config_registry, parallelize
from torchtitan.protocols.module import Module
from torchtitan.tools.utils import set_default_dtype
from torchtitan.trainer import dist_utils

from fastdiff.integrations.torchtitan import MaskedDiffusionLoss, masked_diffusion

V, M, L, BATCH, STEPS = 2048, 2047, 16, 4, 2


def rows(step, unlabelled=0.2):
    """input and labels of a step's global batch: labels are one token ahead, and some are not there."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(M, (BATCH, L + 1), generator=g)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(torch.rand(BATCH, L, generator=g) < unlabelled, -100)


class Rows(torch.utils.data.IterableDataset):
    """A rank's rows: those of all ranks make up the first part of a batch, then the next."""

    def __init__(self, rank, world_size, size, unlabelled):
        self.firsts, self.size, self.unlabelled = range(rank * size, BATCH, world_size * size), size, unlabelled

    def __iter__(self):
        for step in itertools.count():
            tokens, labels = rows(step, self.unlabelled)
            for first in self.firsts:
                for i in range(first, first + self.size):
                    yield {"input": tokens[i], "positions": torch.arange(L)}, labels[i]


class Loader(ParallelAwareDataloader):
    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        infinite: bool = True
        unlabelled: float = 0.2

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **kwargs):
        dataset = Rows(dp_rank, dp_world_size, local_batch_size, config.unlabelled)
        super().__init__(dataset, dp_rank, dp_world_size, batch_size=local_batch_size)


def published_loss(model, loss_fn, step, size=BATCH, **training):
    """Of a whole batch on one process: cross-entropy of the masked rows of logits, weighted, over all labels."""
    tokens, labels = (tensor[:size] for tensor in rows(step))
    xt, noised = loss_fn.noised(dict(input=tokens), labels, step, 0, 1, **training)
    mask = noised.real != -100
    logits = model(xt["input"], positions=torch.arange(L).expand(size, L)).index_fill(-1, torch.tensor(M), -torch.inf)
    nll = F.cross_entropy(logits[mask], labels[mask], reduction="none")
    return (nll * noised.imag[mask]).sum() / (labels != -100).sum()


def config_of(folder, local_batch_size, parallelism, dtype="float64", steps=STEPS):
    Path(folder, "vocab.txt").write_text("\n".join(f"<{i}>" for i in range(V)))
    Path(folder, "tokenizer_config.json").write_text(f'{{"mask_token": "<{M}>"}}')
    config = masked_diffusion(config_registry.llama3_debugmodel(), seed=3)
    config.hf_assets_path = config.dump_folder = folder
    config.dataloader = config.validator.dataloader = Loader.Config()
    config.validator.enable, config.validator.steps, config.validator.freq = True, 1, 1
    config.debug.enable_structured_logging, config.debug.seed = False, 0
    del config.model_spec.model.layers[2:]
    training = dict(seq_len=L, steps=steps, global_batch_size=BATCH, local_batch_size=local_batch_size)
    training |= dict.fromkeys(("dtype", "mixed_precision_param", "mixed_precision_reduce"), dtype)
    for part, values in ((config.training, training), (config.parallelism, parallelism)):
        for name, value in values.items():
            setattr(part, name, value)
    return config


def trained(local_batch_size, **parallelism):
    """Steps of the trainer and a validation after each, held against one process that has the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(folder, local_batch_size, parallelism)
        trainer = config.build()
        mesh = trainer.parallel_dims.get_optional_mesh("batch")
        ranks = mesh.size() if mesh else 1
        with set_default_dtype(torch.float64), torch.no_grad():
            model = config.model_spec.model.build()
            model.init_weights()
        parameters = {
            n.replace("_checkpoint_wrapped_module.", ""): p for n, p in trainer.model_parts[0].named_parameters()
        }
        if not all(isinstance(p, DTensor) for p in parameters.values()):
            give_parts(parameters, model)
        losses, expected = [], []

        def one_process(*batch, **training):
            model.zero_grad()
            for name, p in parameters.items():
                model.get_parameter(name).data.copy_(whole(p.detach(), p))
            loss = published_loss(model, trainer.loss_fn, *batch, **training)
            expected.append(loss.item())
            return loss

        def clip_grad_norm_(*args, **kwargs):
            """Before the optimiser's step."""
            step = len(losses) // 2
            one_process(step).backward()
            for name, p in parameters.items():
                grad, expected_grad = whole(p.grad, p), model.get_parameter(name).grad
                torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-13, msg=f"{name}: {{}}".format)
                if not isinstance(p, DTensor) and p.cut is None:
                    p.grad = grad  # as FSDP2 does
            return torch.zeros(())

        def log_validation(loss, step):
            assert {type(p) for p in trainer.model_parts[0].parameters()} == {type(p) for p in parameters.values()}
            one_process(0, local_batch_size * ranks, training=False)
            losses.append(loss)

        trainer.metrics_processor.log = lambda step, loss, *args, **kwargs: losses.append(loss)
        trainer.metrics_processor.log_validation = log_validation
        before, dist_utils.clip_grad_norm_ = dist_utils.clip_grad_norm_, clip_grad_norm_
        trainer.train()
        dist_utils.clip_grad_norm_ = before
        trainer.close()
        dist.barrier()  # before files go
    assert len(losses) == 2 * STEPS
    assert trainer.ntokens_seen * ranks == STEPS * BATCH * L
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


def whole(tensor, p):
    """A parameter, or its gradient, from all ranks' parts."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    if p.cut is not None:
        return torch.cat(parts, p.cut)
    return tensor if torch.equal(*parts) else sum(parts)  # of gradients each has a part of the sequence's


def give_parts(parameters, model):
    """Gives a rank its parts of a model's weights."""
    for name, p in parameters.items():
        full = model.get_parameter(name).detach()
        p.cut = next((dim for dim in range(p.dim()) if p.shape[dim] != full.shape[dim]), None)
        p.data.copy_(full if p.cut is None else full.chunk(2, p.cut)[dist.get_rank()])


def accumulated():
    trained(1, spmd_backend="partial_dtensor")


def fsdp2():
    trained(1, spmd_backend="partial_dtensor")


def tensor_parallel():
    trained(4, spmd_backend="partial_dtensor", tensor_parallel_degree=2)


def tensor_parallel_spmd_types():
    """FSDP2 of this backend asks for a torch after 2.13; so it goes without, and with weights from elsewhere."""
    parallelize.apply_fsdp_to_decoder = Module._init_self_parameters = lambda *args, **kwargs: None
    torch.autograd.set_multithreading_enabled(False)  # as it does where it makes the process group
    trained(4, spmd_backend="spmd_types", tensor_parallel_degree=2)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, tokens):
        return self.embed(tokens)


def last_layer_of_its_own():
    """One that FSDP2 shards apart from all that is called."""
    torch.manual_seed(0)
    model, tokens = Body().double(), torch.randint(8, V, (2, L))
    labels = torch.complex(tokens.double(), torch.rand(2, L).double())
    loss_fn = MaskedDiffusionLoss.Config(mask_index=M).build()

    def grads(rows):
        loss_fn.set_lm_head(model.lm_head)
        loss_fn(model(tokens[rows]), labels[rows], torch.tensor(2))[0].backward()
        return [p.grad for p in model.parameters()]

    expected = grads(slice(None))
    fully_shard(model.lm_head)
    fully_shard(model)
    model.zero_grad()
    for sharded, grad in zip(grads(slice(dist.get_rank(), dist.get_rank() + 1)), expected, strict=True):
        torch.testing.assert_close(2 * sharded.full_tensor(), grad, rtol=1e-10, atol=1e-13)  # FSDP2 takes the mean


if __name__ == "__main__":
    torchrun.run(globals())
