"""Published checkpoints: their networks' outputs, the forms in which weights come, and what is refused."""

import json
import math
import os
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastdiff import dse_nll, exact_nll, time_free_nll
from fastdiff.model import DiffusionTransformer, ModelConfig, inverse_frequencies
from fastdiff.published import KINDS, load_published
from fastdiff.weights import read_weights

V, D, DEPTH, HEADS, C, L = 19, 24, 2, 3, 8, 6


def made(kind, num_states=V):
    """A network with random weights, of which none is 0 or 1."""
    radd = kind == "radd"
    config = ModelConfig(num_states, None, D, DEPTH, HEADS, 0 if radd else C, radd, learned_positions=False)
    network, g = DiffusionTransformer(config), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / 3
    return network


def weights_of(network):
    """Under their published names."""
    state = network.state_dict()
    embedding = state.pop("vocab_embed.weight")
    return {"vocab_embed.embedding": embedding, "rotary_emb.inv_freq": inverse_frequencies(D // HEADS), **state}


def outputs(weights, xt, sigma, sees=None, positions=None):
    """What the published code computes of its weights, formula by formula, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    conditioned = "sigma_map.mlp.0.weight" in w

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * w[name + ".weight"] + w.get(name + ".bias", 0)

    def modulation(name, n):
        if conditioned:
            return linear(c, name + ".adaLN_modulation")[:, None].chunk(n, -1)
        return [0, 0, 1, 0, 0, 1][:n]

    def turned(x):  # [B, L, heads, D / heads], as complex numbers
        half = x.shape[-1] // 2
        at = torch.arange(x.shape[1]) if positions is None else positions
        angle = at[:, None].double() * w["rotary_emb.inv_freq"]
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([z.real, z.imag], -1)

    if conditioned:
        waves = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angle = sigma.float()[:, None] * waves
        c = F.silu(linear(torch.cat([angle.cos(), angle.sin()], -1).double(), "sigma_map.mlp.0"))
        c = F.silu(linear(c, "sigma_map.mlp.2"))
    x = w["vocab_embed.embedding"][xt]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, 6)
        qkv = linear(norm(x, block + ".norm1") * (1 + scale1) + shift1, block + ".attn_qkv")
        q, k, v = qkv.view(*xt.shape, 3, HEADS, -1).unbind(2)
        score = torch.einsum("blhd,bmhd->bhlm", turned(q), turned(k)) / math.sqrt(q.shape[-1])
        score = score if sees is None else score.masked_fill(~sees, -math.inf)
        mixed = torch.einsum("bhlm,bmhd->blhd", score.softmax(-1), v).flatten(2)
        x = x + gate1 * linear(mixed, block + ".attn_out")
        inner = linear(norm(x, block + ".norm2") * (1 + scale2) + shift2, block + ".mlp.0")
        x = x + gate2 * linear(F.gelu(inner, approximate="tanh"), block + ".mlp.2")
    shift, scale = modulation("output_layer", 2)
    return linear(norm(x, "output_layer.norm_final") * (1 + scale) + shift, "output_layer.linear")


@pytest.mark.parametrize("kind", ["radd", "mdlm"])
def test_outputs_are_the_published_formulas(kind):
    network = made(kind).double()
    xt, sigma = torch.randint(V, (3, L)), torch.rand(3, dtype=torch.float64) * 3
    noise = () if kind == "radd" else (sigma,)
    expected = outputs(weights_of(network), xt, sigma)
    torch.testing.assert_close(network(xt, *noise), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.float()(xt, *noise).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["radd", "mdlm"])
def test_bfloat16_is_as_near_as_its_weights_are(kind):
    """The error under autocast, in units of what rounding the weights alone does to the published formulas."""
    network, xt, sigma = made(kind), torch.randint(V, (64, L)), torch.rand(64) * 3
    inputs = (xt,) if kind == "radd" else (xt, sigma)
    exact = outputs(weights_of(network), xt, sigma.double())
    rounded = {name: w.bfloat16() if w.dim() == 2 else w for name, w in weights_of(network).items()}
    unit = (outputs(rounded, xt, sigma.double()) - exact).square().mean().sqrt()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        error = (network(*inputs).double() - exact).square().mean().sqrt()
    assert unit / 2 < error < 2 * unit


def test_two_halves_and_a_noise_level_for_each_token():
    """BD3-LM's noised and clean tokens, side by side."""
    network = made("bd3lm").double()
    both, sigma, at = torch.randint(V, (2, 2 * L)), torch.rand(2, dtype=torch.float64), torch.arange(2 * L)
    block, clean = at % L // 2, at >= L
    sees = (block[:, None] == block) & (clean[:, None] == clean) | (clean & (block < block[:, None]))
    expected = outputs(weights_of(network), both, sigma, sees, at % L)
    torch.testing.assert_close(network(both, sigma, sees, at % L), expected, rtol=1e-12, atol=1e-12)
    each = sigma[:, None].expand(2, 2 * L)
    torch.testing.assert_close(network(both, each, sees, at % L), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------
# Files.


def sedd_folder(folder, kind, network):
    """As SEDD's and RADD's hub has them."""
    model = dict(hidden_size=D, n_heads=HEADS, n_blocks=DEPTH, cond_dim=C, length=L, scale_by_sigma=True)
    said = dict(tokens=V - 1, graph=dict(type="absorb"), noise=dict(type="loglinear"), model=model)
    (folder / "config.json").write_text(json.dumps(said))
    save_file(weights_of(network), folder / "model.safetensors")


def hub_folder(folder, kind, network):
    """As MDLM's, Duo's and BD3-LM's hub: wrapped, in two files, without the buffer."""
    said = dict(vocab_size=V, model_length=L, hidden_dim=D, n_heads=HEADS, cond_dim=C, time_conditioning=kind == "duo")
    (folder / "config.json").write_text(json.dumps(said))
    weights = {f"backbone.{n}": w for n, w in weights_of(network).items() if "inv_freq" not in n}
    if kind == "bd3lm":
        weights |= {"sampling_eps_min": torch.tensor(0.0), "sampling_eps_max": torch.tensor(1.0)}
    parts = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(weights)}
    for part in set(parts.values()):
        save_file({name: weights[name] for name in weights if parts[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=parts)))


def run_folder(folder, kind, network):
    """As SEDD's and RADD's training leaves it: weights of the last step, and their averages without names."""
    (folder / "checkpoints-meta").mkdir()
    last = OrderedDict((name, tensor + ("inv_freq" not in name)) for name, tensor in weights_of(network).items())
    ema = dict(decay=0.9999, num_updates=7, shadow_params=list(network.parameters()))
    torch.save(dict(optimizer={}, model=last, ema=ema, step=9), folder / "checkpoints-meta" / "checkpoint.pth")


class Hyper:
    """A class that a reader of the checkpoint does not have."""

    def __init__(self):
        self.rate = 3e-4


def lightning_file(folder, kind, network):
    """As Lightning writes it, of MDLM, BD3-LM and Duo."""
    state = {f"backbone.{name}": tensor + ("inv_freq" not in name) for name, tensor in weights_of(network).items()}
    ema = dict(decay=0.9999, num_updates=7, shadow_params=list(network.parameters()))
    saved = dict(state_dict=state, ema=ema, hyper_parameters=dict(config=Hyper()), epoch=1, callbacks={})
    torch.save(saved, folder / "last.ckpt")


FORMS = [(kind, form) for kind in ("sedd", "radd") for form in (sedd_folder, run_folder)]
FORMS += [(kind, form) for kind in ("mdlm", "duo", "bd3lm") for form in (hub_folder, lightning_file)]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_every_form_of_a_checkpoint(kind, form, tmp_path):
    network = made(kind)
    form(tmp_path, kind, network)
    published = load_published(kind, tmp_path, mask_index=V - 1)
    xt, sigma = torch.randint(V, (2, L)), torch.tensor([0.3, 1.7])
    noise = () if kind == "radd" else (sigma if kind in ("sedd", "duo") else torch.zeros(2),)
    torch.testing.assert_close(published.score(xt, sigma), network(xt, *noise), rtol=0, atol=0)
    assert (published.graph.mask_index is None) == (kind == "duo")
    assert not published.network.training


def test_no_code_of_a_file_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    weights = {"vocab_embed.embedding": torch.ones(2, 2)}
    torch.save(dict(state_dict=weights, hyper_parameters=Trap(), more=[Trap()]), tmp_path / "model.pt")
    assert torch.equal(read_weights(tmp_path)["vocab_embed.embedding"], torch.ones(2, 2))
    assert not (tmp_path / "trapped").exists()


# ---------------------------------------------------------------------------------------------------------
# Likelihoods.


@pytest.mark.parametrize("kind", ["sedd", "radd", "mdlm"])
def test_likelihood_of_the_conditionals(kind, tmp_path):
    """The estimate is that of a model that is called with the conditionals themselves."""
    network = made(kind)
    (sedd_folder if kind != "mdlm" else hub_folder)(tmp_path, kind, network)
    published = load_published(kind, tmp_path, mask_index=V - 1)
    x0 = torch.randint(V - 1, (2, L))

    def logits(xt):
        sigma = -torch.log1p(-(1 - 1e-3) * (xt == V - 1).float().mean(1))
        return network(xt) if kind == "radd" else network(xt, sigma if kind == "sedd" else torch.zeros_like(sigma))

    expected = exact_nll(logits, x0, mask_index=V - 1).nll
    found = exact_nll(published.conditionals(), x0, mask_index=V - 1).nll
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # of a noise level in float32
    estimate = time_free_nll(published.conditionals(), x0, mask_index=V - 1, num_samples=32)
    assert ((estimate.nll - expected).abs() < 6 * estimate.stderr).all()


def test_likelihood_of_scores(tmp_path):
    for kind, form in (("sedd", sedd_folder), ("duo", hub_folder)):
        folder = tmp_path / kind
        folder.mkdir()
        form(folder, kind, made(kind))
        p = load_published(kind, folder, mask_index=V - 1)
        options = dict(graph=p.graph, schedule=p.schedule, parametrization=p.parametrization, num_samples=8)
        assert dse_nll(p.score, torch.randint(V - 1, (2, L)), **options).nll.isfinite().all()
    with pytest.raises(ValueError, match="uniform"):
        p.conditionals()


# ---------------------------------------------------------------------------------------------------------
# Bad input.


def test_errors_name_what_is_wrong(tmp_path):
    network, path = made("mdlm"), tmp_path / "model.safetensors"
    weights = weights_of(network)

    def loading(kind, weights, match, error=ValueError, **options):
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        with pytest.raises(error, match=match):
            load_published(kind, path, **options)

    loading("gpt2", weights, "kind")
    loading("mdlm", weights, "mask_index")
    loading("radd", weights, "sees the noise level")
    loading("mdlm", weights_of(made("radd")), "does not see the noise level")
    loading("mdlm", {"wte.weight": torch.ones(2, 2)}, "vocab_embed.embedding")
    loading("mdlm", {**weights, "blocks.0.gate.weight": torch.ones(2)}, "1 tensors do not fit; blocks.0.gate.weight")
    loading(
        "mdlm", {n: w for n, w in weights.items() if "1.mlp.0" not in n}, "2 tensors.*blocks.1.mlp.0.bias is missing"
    )
    wider = {**weights, "output_layer.linear.bias": torch.ones(V + 1)}
    loading("mdlm", wider, r"output_layer.linear.bias is \(20,\), expected \(19,\)")
    loading("mdlm", {n: w for n, w in weights.items() if "inv_freq" not in n}, "n_heads")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.safetensors: not weights, damaged or cut short"):
        load_published("mdlm", path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_published("mdlm", tmp_path / "no.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected weights"):
        load_published("mdlm", tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt"):
        load_published("mdlm", tmp_path / "list.pt")


def test_kinds_are_all_tried():
    assert {kind for kind, _ in FORMS} == set(KINDS)
