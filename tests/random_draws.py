"""Random cases of tokens that are drawn from rows. Laws of reverse steps are held against exact.py."""

import exact
import numpy as np
import torch
from hypothesis import strategies as st
from random_cases import TYPES, extended, laid_out, per_token, placed, with_poisoned_buffers

from fastdiff import (
    reverse_probs,
    reverse_step,
    sample_tokens,
)


def rows_to_draw(draw, backend, device, least_states=1):
    """z [B, L, V] in some layout and dtype, an id that is finite, tokens, the mask's id and the names of the draws."""
    shape = draw(st.sampled_from([(1, 3), (2, 2), (2, 4), (4, 1), (0, 3), (2, 0)]))
    num_states = draw(st.sampled_from([27, least_states, 2, 1025, 1024, 1023, 2049, 3000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = torch.randn(*shape, num_states, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    for value in draw(st.sampled_from([[], [-torch.inf], [1e4, -torch.inf], [1e4]])):
        hit = torch.rand(z.shape, generator=g) < draw(st.sampled_from([0.01, 0.5, 1.0]))
        z = z.masked_fill(hit, value)
    finite, mask_index = (draw(st.sampled_from([num_states - 1, num_states // 2, 0])) for _ in range(2))
    z[..., finite] = 0.5
    z = laid_out(draw, z.to(device, draw(st.sampled_from(TYPES[backend]))))
    masked = torch.rand(shape, generator=g) < draw(st.sampled_from([0.5, 1.0]))
    xt = torch.where(masked, mask_index, torch.randint(0, num_states, shape, generator=g))
    names = dict(seed=draw(st.integers(-(2**63), 2**63 - 1)), step=draw(st.integers(0, 2**30)))
    names["sample_ids"] = torch.randint(0, 2**62, shape[:1], generator=g)
    return z, finite, xt, mask_index, names, g


def spoil(z, live):
    """Rows that nobody may read hold NaN."""
    if z.numel() and z.stride(0):  # not where rows are one
        z[~live.to(z.device)] = torch.nan


def tally_tokens(tally, got, expected, live, case):
    """Where tokens agree. A race that float32's roundings decide differently is noted, which is to be rare."""
    same = got == expected
    assert (same | live.to(same.device)).all()
    tally["live rows"] += int(live.sum())
    if not same.all():
        tally["rows that differ"] += int((~same).sum())
        tally["cases"] = [*tally.get("cases", []), case]
    return same


@with_poisoned_buffers
def check_sample(draw, backend, tally, device="cpu"):
    z, finite, xt, mask_index, names, g = rows_to_draw(draw, backend, device)
    num_states = z.shape[-1]
    options = dict(mask_index=mask_index, exclude_mask=draw(st.booleans()) and mask_index != finite)
    options["exclude"] = set(draw(st.lists(st.integers(0, num_states - 1), max_size=3))) - {finite}
    options["temperature"] = draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))
    options["top_k"] = draw(st.sampled_from([None, 1, 3, 40, num_states, 10**6]))
    options["top_p"] = draw(st.sampled_from([None, 1e-6, 0.3, 0.9, 1 - 1e-4]))
    live = xt == mask_index
    if draw(st.booleans()):
        live = options["mask"] = torch.rand(xt.shape, generator=g) < 0.7
    spoil(z, live)
    with_stats = draw(st.booleans())
    case = f"sample_tokens of {z.dtype} {tuple(z.shape)}, {options}, {names}"
    results = []
    for name in (backend, "reference"):
        given = placed(dict(xt=xt, **options, **names), device)
        results.append(sample_tokens(z, backend=name, return_stats=with_stats, **given))
    if not with_stats:
        tally_tokens(tally, *results, live, case)
        return
    (tokens, stats), (expected, expected_stats) = results
    same = tally_tokens(tally, tokens, expected, live, case)
    for x, y in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(x[same], y[same], rtol=2e-5, atol=1e-6)


@with_poisoned_buffers
def check_reverse(draw, backend, tally, device="cpu"):
    z, finite, xt, mask_index, names, g = rows_to_draw(draw, backend, device, least_states=2)
    graph = draw(st.sampled_from(["absorb", "uniform"]))
    forms = ["log_score", "scale_by_sigma", "logits"]
    form = draw(st.sampled_from(forms if finite != mask_index else forms[:2]))  # conditionals are not of the mask
    if graph == "absorb":
        spoil(z, xt == mask_index)
    sigma = 1e-3 * 3e4 ** per_token(draw, xt.shape, g)  # 0.001 to 30
    options = dict(graph=graph, parametrization=form, mask_index=mask_index, sigma=sigma)
    if draw(st.booleans()):
        options["sigma_next"] = sigma * draw(st.sampled_from([0.0, 0.5, 0.99]))
        if graph == "uniform" and form != "logits":  # a step d costs a score exp(d) of its digits
            options["sigma_next"] = sigma - torch.as_tensor(sigma - options["sigma_next"]).clamp_max(1)
    else:
        options["step_size"] = draw(st.sampled_from([1e-3, 0.1, 2.0]))
    temperature = draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))
    case = f"reverse_step of {z.dtype} {tuple(z.shape)}, temperature {temperature}, {options}, {names}, xt {xt}"
    tokens, probs = [], []
    for name in (backend, "reference"):
        given = placed(dict(xt=xt, backend=name, **options), device)
        tokens.append(reverse_step(z, temperature=temperature, **given, **placed(names, device)))
        probs.append(reverse_probs(z, **given))
    live = xt == mask_index if graph == "absorb" else torch.ones_like(xt, dtype=torch.bool)
    tally_tokens(tally, *tokens, live, case)
    expected = torch.zeros_like(probs[0]).cpu().scatter(-1, xt.unsqueeze(-1), 1)
    expected[live] = torch.from_numpy(law_of_rows(z.cpu().double(), xt, live, options))
    for got in probs:
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-6)


@np.errstate(all="ignore")
def law_of_rows(z, xt, live, options):
    """p(x_s | x_t) of the live tokens, float32."""
    form, uniform, ids = options["parametrization"], options["graph"] == "uniform", xt[live].numpy()
    z, sigma = z[live].numpy().astype(exact.EXTENDED), extended(options["sigma"], live)
    if form == "logits":
        score = exact.implied_score(z, sigma, ids, uniform)
    else:
        shift = exact.sigma_shift(sigma, z.shape[1]) if form == "scale_by_sigma" else 0
        score = np.where(exact.is_id(z, ids), 1, np.exp(z - shift))
    if "step_size" in options:
        return exact.euler(score, ids, extended(options["step_size"], live), uniform).astype(np.float32)
    return exact.tweedie(score, ids, sigma, extended(options["sigma_next"], live), uniform).astype(np.float32)
