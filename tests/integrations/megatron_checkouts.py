"""MegaDLMs' and Megatron-Bridge's own code, from checkouts, run by torchrun: a step before and after.

Of MegaDLMs everything but the transformer's layers is its own, with its Megatron-Core. Of Megatron-Bridge the step is,
over the Megatron-Core that is installed.
"""

import importlib.util
import itertools
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torchrun
from rows import largest_rows
from torch import nn

from fastdiff.integrations.megatron import apply_to_megadlms, apply_to_megatron_bridge

B, S, D, V = 3, 16, 8, 94
CHECKOUTS = Path(os.environ["FASTDIFF_CHECKOUTS"]).resolve()


class Decoder(nn.Module):
    """In the place of the transformer's layers, [s, b, D]."""

    def __init__(self, config, **_):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, hidden_states, **_):
        return torch.tanh(self.linear(hidden_states))


class Arguments(SimpleNamespace):
    def __contains__(self, name):
        return hasattr(self, name)


class Timer:
    """A timer, and what it is asked for."""

    def __call__(self, *_, **__):
        return self

    __enter__ = __exit__ = start = stop = __call__


def model_of(gpt_model, block, tied, sequence_parallel):
    from megatron.core import tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    setattr(gpt_model, block, Decoder)
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=D,
        num_attention_heads=2,
        use_cpu_initialization=True,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=dist.get_world_size(),
        params_dtype=torch.float64,
        pipeline_dtype=torch.float64,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
    )
    vars(config).update(different_seed_per_dp=False, mask_token_id=V - 1)
    torch.manual_seed(0)
    options = dict(share_embeddings_and_output_weights=tied, position_embedding_type="none")
    return gpt_model.GPTModel(config, None, V, 2 * S, **options).double()


def agree(step, apply, rows):
    """step(tied, sequence_parallel): a model, and what gives its loss, of so many rows of logits before."""
    part = V // dist.get_world_size()
    for tied, sequence_parallel in itertools.product((False, True), {False, dist.get_world_size() > 1}):
        model, loss_of = step(tied, sequence_parallel)

        def results(model=model, loss_of=loss_of):
            model.zero_grad()
            with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # to which the published one casts
                loss = loss_of()
                loss.backward()
            return [loss.detach(), *(p.grad for p in model.parameters())]

        expected, before = largest_rows(results, part)
        undo = apply()
        got, after = largest_rows(results, part)
        undo()
        assert after < rows <= before
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def megadlms():
    with_megatron(CHECKOUTS / "megadlms")
    from megatron.core.models.difflm import gpt_model
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = Arguments(
        seed=1, model_running_mode="difflm-noshift", attention_mask_type="no_mask", mask_token=V - 1, curr_iteration=0,
        difflm_varilen_prob=0.0, global_batch_size=B, micro_batch_size=B, data_parallel_size=1,
    )  # fmt: skip
    tokens = torch.randint(0, V - 1, (B, S + 1), generator=torch.Generator().manual_seed(3))

    def step(tied, sequence_parallel):
        model = model_of(gpt_model, "DiffLMTransformerBlock", tied, sequence_parallel)

        def loss():
            model.difflm_rng_generator = None  # the same noise each time
            losses, _ = model(tokens, torch.arange(S + 1).expand(B, -1), None, labels=tokens.roll(-1, 1))
            return (losses * torch.linspace(1, 2, S)).sum()

        return model, loss

    agree(step, apply_to_megadlms, rows=B * S)


def bridge():
    with_megatron(None)
    from megatron.core.models.gpt import gpt_model

    for name in ("", ".diffusion", ".diffusion.common", ".diffusion.models", ".diffusion.models.common", ".training"):
        package(f"megatron.bridge{name}")
    package("megatron.bridge.training.config", ConfigContainer=object)
    package("megatron.bridge.training.state", GlobalState=object)
    package("megatron.bridge.training.losses", _DEFAULT_SPIKY_LOSS_FACTOR=10, masked_next_token_loss=None)
    own("megatron.bridge.diffusion.common.dllm")
    dgpt_step = own("megatron.bridge.diffusion.models.common.dgpt_step")
    tokens = torch.randint(0, V - 1, (B, S), generator=torch.Generator().manual_seed(3))
    batch = (tokens, tokens.roll(-1, 1), torch.ones(B, S), None, None, None, None, None)
    vars(dgpt_step).update(get_batch=lambda *_: batch, get_num_microbatches=lambda: 1, get_rerun_state_machine=Timer())
    checks = SimpleNamespace(check_for_nan_in_loss=False, check_for_spiky_loss=False)
    state = SimpleNamespace(timers=Timer(), straggler_timer=Timer(), cfg=SimpleNamespace(rerun_state_machine=checks))
    positions = torch.arange(2 * S).expand(B, -1)
    batch = (*batch[:4], positions, *batch[5:])

    def step(tied, sequence_parallel):
        model = model_of(gpt_model, "TransformerBlock", tied, sequence_parallel)

        def loss():
            torch.manual_seed(5)
            output, loss_of = dgpt_step.DGPTStep()(state, None, model)
            return loss_of(output)[0]

        return model, loss

    agree(step, apply_to_megatron_bridge, rows=B * 2 * S)


def with_megatron(folder):
    """Megatron, from a checkout or as it is installed, with one tensor-parallel group of all ranks."""
    warnings.simplefilter("ignore")
    if folder is not None:
        sys.path.insert(0, str(folder))
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: torch.device("cpu")
    parallel_state.initialize_model_parallel(dist.get_world_size())


def package(name, **names):
    sys.modules[name] = module = ModuleType(name)
    module.__path__ = []
    vars(module).update(names)


def own(name):
    path = CHECKOUTS / "megatron_bridge" / "src" / (name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torchrun.run(globals())
