"""The list of scored rows in one launch, which CUDA C++ has."""

import pytest
import torch

from fastdiff import scored_rows
from fastdiff.backends import CUDA_MISSING, EMULATING, INTERPRETING

if CUDA_MISSING or (INTERPRETING and not EMULATING):
    pytest.skip("needs the CUDA kernels", allow_module_level=True)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [0, 1, 31, 16384, 16385, 40000])  # about a warp, and about a block's chunk
def test_it_is_that_of_nonzero(size, share, device):
    scored = (torch.rand(size + 1, generator=torch.Generator().manual_seed(size)) < share).to(device)
    for some in (scored[:-1], scored[1:]):  # aligned to 16 bytes, and not
        expected = some.nonzero().squeeze(1)
        for capacity in (0, len(expected) // 2, len(expected), size + 7):
            index, count = scored_rows(some, capacity, backend="cuda")
            filled = torch.cat([expected, expected.new_full((size + 7,), size)])[:capacity]
            assert torch.equal(index, filled)
            assert count == len(expected)


def test_opcheck(device):
    scored = torch.tensor([[True, False, True]], device=device)
    torch.library.opcheck(torch.ops.fastdiff.compact.cuda, (scored, 2))


def test_compiles_whole(device):
    scored = torch.rand(3, 50, device=device) < 0.5

    def listed(mask):
        return scored_rows(mask, 60, backend="cuda")

    torch._dynamo.reset()
    for got, expected in zip(
        torch.compile(listed, fullgraph=True, backend="aot_eager")(scored), listed(scored), strict=True
    ):
        assert torch.equal(got, expected)
