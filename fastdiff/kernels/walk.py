"""Walking a row to draw from it in Triton, in tiles of BLOCK lanes, a multiple of CLASSES.

`row` is (z, aligned, head, groups, V, exclude, num_excluded, num_struck, xt): where the row and its first aligned group
start, how many numbers come before that, how many groups follow; then the ids that are left out, which with a law are
one more than the excluded ones: x_t.
"""

import triton
import triton.language as tl

from fastdiff.ops.row_sample import RACE_CLASSES

CLASSES = tl.constexpr(RACE_CLASSES)


@triton.jit
def strike(x, ids, first, last, absent, row):
    """`absent` in the place of ids that are left out. They are few: a branch for each is less than to compare all."""
    _, _, _, _, _, exclude, num_excluded, num_struck, xt = row
    for i in range(num_struck):
        struck = tl.load(exclude + i, mask=i < num_excluded, other=xt)
        if (struck >= first) & (struck < last):
            x = tl.where(ids == struck.to(tl.int32), absent, x)
    return x


@triton.jit
def tile_of(row, i, absent, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The numbers and ids of tile i of the groups."""
    _, aligned, head, groups, _, _, _, _, _ = row
    offsets = i * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(aligned + offsets, mask=offsets // VEC < groups, other=absent, eviction_policy="evict_last")
    first = head + i * BLOCK
    return strike(x.to(tl.float32), head + offsets, first, first + BLOCK, absent, row), head + offsets


@triton.jit
def edge_of(row, i, absent, VEC: tl.constexpr):
    """What lies before the groups (0) or after them (1), in the lanes of its classes."""
    z, _, head, groups, V, _, _, _, _ = row
    end = groups * VEC
    first = head + tl.where(i == 0, -CLASSES, end // CLASSES * CLASSES)
    ids = first + tl.arange(0, CLASSES)
    exists = ((ids >= 0) & (ids < head)) | ((ids >= head + end) & (ids < V))
    x = tl.load(z + ids, mask=exists, other=absent).to(tl.float32)
    return strike(x, ids, first, first + CLASSES, absent, row), ids


@triton.jit
def num_tiles(row, BLOCK: tl.constexpr, VEC: tl.constexpr):
    return tl.cdiv(row[3] * VEC, BLOCK)


@triton.jit
def first_edge(row):
    return tl.where(row[2] == 0, 1, 0)
