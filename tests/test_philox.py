"""The random bits: published vectors, and that a draw depends on its names alone."""

import pytest
import torch

from fastdiff.philox import Purpose, draw32, philox4x32, scaled, scaled_in_stratum, uniform

ONES = 0xFFFFFFFF
# Known answers of philox4x32-10 from Random123: (key, counter, words).
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES), (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key, counter, words):
    assert tuple(int(w) for w in philox4x32(key, counter)) == words


def test_counter_is_the_names_and_lane_is_the_low_bits_of_the_index():
    seed, step, sample, row, index = 0x299F31D0A4093822 - 2**63, 5, 7, 11, 14
    key = (seed & ONES, (seed >> 32) & ONES)
    words = philox4x32(key, (index >> 2, row, sample, (int(Purpose.RACE) << 24) | step))
    assert draw32(seed, Purpose.RACE, step, sample, row, index) == words[index & 3]


def test_draws_do_not_depend_on_the_batch_around_them():
    sample, index = torch.arange(50).unsqueeze(1), torch.arange(33)
    table = draw32(3, Purpose.MASK, 2, sample, 0, index)
    assert torch.equal(
        table[[41, 7]][:, 5:9], draw32(3, Purpose.MASK, 2, torch.tensor([[41], [7]]), 0, torch.arange(5, 9))
    )
    assert torch.equal(table.flip(0), draw32(3, Purpose.MASK, 2, sample.flip(0), 0, index))


def test_every_name_counts():
    names = [1, Purpose.MASK, 1, 1, 1, 4]
    draws = {int(draw32(*names))}
    for k, other in enumerate([2, Purpose.SUBSET, 2, 2, 2, 8]):
        draws.add(int(draw32(*names[:k], other, *names[k + 1 :])))
    assert len(draws) == 7


def test_far_steps_and_samples_take_another_key():
    near = draw32(9, Purpose.MASK, 0, 0, 0, torch.arange(8))
    for step, sample in [(2**24, 0), (0, 2**32), (2**24, 2**32), (2**25, 0)]:
        far = draw32(9, Purpose.MASK, step, sample, 0, torch.arange(8))
        assert (far == near).sum() == 0
    mixed = draw32(9, Purpose.MASK, torch.tensor([0, 2**24]), 0, 0, 3)
    assert mixed[0] == near[3]
    assert mixed[1] == draw32(9, Purpose.MASK, 2**24, 0, 0, 3)


def test_uniforms_are_uniform_and_inside_the_open_interval():
    u = uniform(0, Purpose.TIME, 0, 0, 0, torch.arange(100_000))
    counts = torch.histc(u, 100, 0, 1)
    assert 60 < ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-square, 99 degrees of freedom
    assert u.min() > 0
    assert u.max() < 1


SIZES = [1, 2, 1000, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**45 + 12345, 2**62 - 1]
DRAWS = [0, 1, 0x7FFFFFFF, 0x80000000, 0x9E3779B9, ONES]


def test_scaled_draws_are_exact_where_the_product_has_more_than_63_bits():
    for size in SIZES:
        want = [draw * size >> 32 for draw in DRAWS]
        assert scaled(torch.tensor(DRAWS), size).tolist() == want
        assert scaled(torch.tensor(DRAWS), torch.tensor(size)).tolist() == want


def test_draws_in_strata_are_exact_where_the_product_has_more_than_63_bits():
    for size in SIZES:
        for n in (1, 3, 70_000, 2**31):
            for j in {0, n // 3, n - 1}:
                want = [((j << 32) + draw) * size // (n << 32) for draw in DRAWS]
                assert scaled_in_stratum(torch.tensor(DRAWS), j, n, torch.tensor(size)).tolist() == want
                assert scaled_in_stratum(torch.tensor(DRAWS), torch.tensor(j), n, size).tolist() == want
