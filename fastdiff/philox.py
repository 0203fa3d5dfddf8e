"""Random bits as a pure function of names: Philox4x32-10 in torch int64, the twin of csrc/philox.h.

The same (seed, purpose, step, sample, row, index) gives the same 32 bits on every backend and device,
whatever the batch around it.
"""

import enum

import torch
from torch import Tensor

from fastdiff.checks import check_integer

_MASK32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Purpose(enum.IntEnum):
    """What a draw is for. Values start at 0x80: smaller ones could repeat torch's own CUDA stream."""

    MASK = 0x80
    SUBSET = 0x81
    COUNT = 0x82
    REPLACE = 0x83
    TIME = 0x84
    RACE = 0x85
    STEP = 0x86
    LIMIT = 0x87
    DATA = 0x88
    ORDER = 0x89
    DERIVE = 0xFF


Names = int | Tensor


def philox4x32(key: tuple[Names, Names], counter: tuple[Names, Names, Names, Names]) -> tuple[Tensor, ...]:
    """Ten Philox rounds (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    k0, k1 = key
    c0, c1, c2, c3 = (c.long() if isinstance(c, Tensor) else _on_host(c) for c in counter)
    for _ in range(10):
        # The products wrap modulo 2^64 in int64, so the masked halves are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        hi0, hi1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, p1 & _MASK32, hi0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def draw32(seed: Names, purpose: Names, step: Names, sample: Names, row: Names, index: Names) -> Tensor:
    """Unsigned 32-bit draws, as int64, for the given names; ints and int64 tensors broadcast together.

    Steps from 2^24 and samples from 2^32 on go through one more Philox call that derives another key.
    """
    named = [x for x in (seed, step, sample, row, index) if isinstance(x, Tensor)]
    device = named[0].device if named else "cpu"
    seed, step, sample, index = (
        torch.as_tensor(x, dtype=torch.int64, device=device) for x in (seed, step, sample, index)
    )
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    high_sample, high_step = (sample >> 32) & _MASK32, (step >> 24) & _MASK32
    derived = philox4x32((k0, k1), (high_sample, high_step, 0, int(Purpose.DERIVE) << 24))
    far = (high_sample | high_step) != 0
    key = (torch.where(far, derived[0], k0), torch.where(far, derived[1], k1))
    word3 = (int(purpose) << 24) | (step & 0xFFFFFF)
    lanes = torch.stack(torch.broadcast_tensors(*philox4x32(key, (index >> 2, row, sample & _MASK32, word3))))
    lane = (index & 3).expand(lanes.shape[1:])
    return lanes.gather(0, lane.unsqueeze(0)).squeeze(0)


def _on_host(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def uniform(seed: Names, purpose: Names, step: Names, sample: Names, row: Names, index: Names) -> Tensor:
    """Float64 uniforms in (0, 1): (draw32 + 1/2) 2^-32."""
    return (draw32(seed, purpose, step, sample, row, index).double() + 0.5) * 2.0**-32


def scaled(draw: Tensor, size: Names) -> Tensor:
    """floor(size draw / 2^32), of [0, size) uniformly, for any size of 63 bits: two products, of its halves."""
    return draw * (size >> 32) + (((draw * (size & _MASK32)) >> 32) & _MASK32)


def scaled_in_stratum(draw: Tensor, j: Names, n: int, size: Names) -> Tensor:
    """floor(size (j + draw / 2^32) / n), of the j-th of n strata of [0, size), j < n <= 2^31, size < 2^62."""
    whole, rest = size // n, size % n
    return j * whole + (j * rest + scaled(draw, size)) // n


def resolve_seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device | None) -> Tensor:
    """The seed as an int64 tensor on the device (None: its own, or the CPU); None draws one from the generator."""
    if seed is None:
        device = device or torch.device("cpu")
        drawn_on = device if generator is None else generator.device
        return torch.randint(2**63 - 1, (), generator=generator, device=drawn_on).to(device)
    if generator is not None:
        raise ValueError("generator: expected one of seed and generator, got both")
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed: expected one int64, got {seed.dtype} {tuple(seed.shape)}")
        return seed.reshape(()).to(device or seed.device)
    return torch.full((), check_integer("seed", seed), dtype=torch.int64, device=device or "cpu")
