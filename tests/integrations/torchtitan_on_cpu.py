"""Lets torchtitan 0.3.0 run on the CPU with gloo, in float64. To be imported before any other module of torchtitan."""

import torch
import torch.distributed as dist
import torchtitan.tools.utils as utils
from torch.distributed.fsdp import FSDPModule


class _Cpu:
    """torch.cpu, and what else torchtitan asks of an accelerator."""

    def __getattr__(self, name):
        return getattr(torch.cpu, name)

    def get_device_name(self, device=None):
        return "cpu"

    def current_device(self):
        return 0

    def get_device_properties(self, device=None):
        return type("Properties", (), {"total_memory": 1 << 34, "name": "cpu"})

    def reset_peak_memory_stats(self):
        pass

    def empty_cache(self):
        pass

    def memory_stats(self, device=None):
        return {}


utils.device_type, utils.device_module = "cpu", _Cpu()

import torchtitan.trainer  # noqa: E402  # after the device is set
from torchtitan.distributed import fsdp  # noqa: E402

if not hasattr(dist, "set_timeout"):
    dist.set_timeout = dist.distributed_c10d._set_pg_timeout  # its name before torch 2.14
torchtitan.trainer.time.sleep = lambda seconds: None  # after training, for other ranks
torchtitan.trainer.TORCH_DTYPE_MAP["float64"] = torch.float64


def _sum_gradients(model, published=fsdp.disable_fsdp_gradient_division):
    """By sums: a factor to divide by makes them sums of products, which gloo has not."""
    published(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


fsdp.disable_fsdp_gradient_division = _sum_gradients
_float = torch.Tensor.float
torch.Tensor.float = lambda tensor: tensor if tensor.dtype == torch.float64 else _float(tensor)  # its RoPE rounds
