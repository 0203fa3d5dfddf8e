"""Stand-ins for the codebases that fastdiff drops into: what each computes at its seam, in plain PyTorch.

Given a folder of their checkouts in FASTDIFF_CHECKOUTS, each under the name of its file here, the real code is used.
"""

import __future__

import ast
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

NEEDS = {  # beside torch and, where a version matters, transformers
    "bd3lm": "datasets einops hydra-core lightning omegaconf requests timm torchvision",
    "dllm": "transformers==4.57.0 accelerate==1.11.0 datasets==4.2.0 peft==0.17.1 lm-eval==0.4.9 trl==0.24.0 "
    "torchmetrics tyro",
    "duo": "datasets einops hydra-core lightning omegaconf requests timm torchvision",
    "mdlm": "datasets einops hydra-core lightning omegaconf requests timm torchvision",
    "radd": "einops omegaconf",
    "sedd": "einops omegaconf",
}
ON_GPUS = ("causal_conv1d", "flash_attn", "mamba_ssm")  # cannot be installed without one, and no seam calls them


@dataclass
class Problem:
    """A noised batch. Times and noise levels are one number a sequence, [B] float64."""

    x0: Tensor  # int64 [B, L]
    xt: Tensor  # x0 with masks
    moved: Tensor  # x0 with tokens drawn anew
    t: Tensor
    sigma: Tensor  # total noise of the log-linear schedule, -log(1 - t)
    dsigma: Tensor  # its rate, 1 / (1 - t)
    num_states: int  # the mask is the last

    @property
    def mask_index(self) -> int:
        return self.num_states - 1


def problem(batch: int, length: int, num_states: int, seed: int = 0, noise: float | None = None) -> Problem:
    """noise: the share of noised tokens; None draws one for each sequence."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    x0 = torch.randint(0, num_states - 1, (batch, length), generator=g)
    t = 0.05 + 0.9 * torch.rand(batch, generator=g, dtype=torch.float64)
    t = t if noise is None else torch.full_like(t, noise)
    noised = torch.rand(batch, length, generator=g) < t[:, None]
    anew = torch.randint(0, num_states, (batch, length), generator=g)
    xt, moved = torch.where(noised, num_states - 1, x0), torch.where(noised, anew, x0)
    return Problem(x0, xt, moved, t, -torch.log1p(-t), 1 / (1 - t), num_states)


Loss = Callable[[nn.Module], Tensor]  # of a network
Case = tuple[Loss, Loss]  # the published one, ours


class Network(nn.Module):
    """A last layer over hidden states that are there already: [B, 2 L, D], for layouts of two halves."""

    def __init__(self, p: Problem, width: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        batch, length = p.x0.shape
        self.hidden = nn.Parameter(torch.randn(batch, 2 * length, width, dtype=dtype))
        self.lm_head = nn.Linear(width, p.num_states, bias=bias, dtype=dtype)

    def forward(self, input_ids: Tensor, *_: Any, **asked: Any) -> SimpleNamespace:
        self.asked = dict(asked, input_ids=input_ids)
        batch, length = input_ids.shape
        return SimpleNamespace(logits=self.lm_head(self.hidden[:batch, :length]))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class LastLayer(nn.Module):
    """A network in the place of a last layer: `.linear`, over whatever a codebase has before it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.linear = network, getattr(network, "module", network).get_output_embeddings()

    def forward(self, indices: Tensor, *_: Any) -> Tensor:
        return self.network(indices).logits


def published(name: str, *modules: str) -> dict[str, ModuleType]:
    """The modules of a codebase, by their names: those of its checkout, or its stand-in for each of them.

    Other checkouts have modules of the same names, so that these are not left where an import would find them.
    """
    folder = Path(os.environ.get("FASTDIFF_CHECKOUTS", "")).resolve() / name
    if "FASTDIFF_CHECKOUTS" not in os.environ or not folder.is_dir():
        return dict.fromkeys(modules, sys.modules[f"standins.{name}"])
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    sys.meta_path.append(_Uncalled)
    try:
        return {module: importlib.import_module(module) for module in modules}
    except ImportError as error:
        raise ImportError(f"{folder}: {error}; pip install {NEEDS.get(name, '')}") from error
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(_Uncalled)
        for new in set(sys.modules) - before:
            path = str(getattr(sys.modules[new], "__file__", ""))
            if path.startswith(str(folder)) or _Uncalled.find_spec(new):
                del sys.modules[new]


def functions(file: str, *names: str, **known: Any) -> dict[str, Callable[..., Any]]:
    """Functions of a file among the checkouts, also those inside of others, with all that they know of.

    For what cannot be imported: nothing else of the file runs. {} if it is not there.
    """
    path = Path(os.environ.get("FASTDIFF_CHECKOUTS", os.devnull)) / file
    if not path.is_file():
        return {}
    found = [node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "name", None) in names]
    for node in found:
        node.decorator_list = []
    exec(compile(ast.Module(found, []), path, "exec", __future__.annotations.compiler_flag), known)
    return {name: known[name] for name in names}


class _Uncalled:
    """Finds something to import for packages that only GPUs have."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Uncalled, is_package=True) if name.partition(".")[0] in ON_GPUS else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> Any:
        return mock.MagicMock()

    @staticmethod
    def exec_module(module: Any) -> None:
        pass


def is_real(module: ModuleType) -> bool:
    return not module.__name__.startswith("standins.")
