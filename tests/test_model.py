import json

import pytest
import torch

from fastdiff.files import write_atomically
from fastdiff.model import DiffusionTransformer, ModelConfig


def make(conditioned: bool = False, **changes) -> DiffusionTransformer:
    torch.manual_seed(0)
    shape = {"num_states": 11, "max_length": 8, "dim": 16, "depth": 2, "heads": 2} | changes
    model = DiffusionTransformer(ModelConfig(**shape, cond_dim=8 * conditioned))
    for parameter in model.parameters():  # outputs are 0 before training, which would hide everything
        torch.nn.init.normal_(parameter, std=0.3)
    return model


XT = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.01, 0.5, 5.0])


def test_shapes_and_head():
    model = make()
    hidden = model.body(XT[:, :5])
    assert hidden.shape == (3, 5, 16)
    torch.testing.assert_close(model.lm_head(hidden), model(XT[:, :5]))
    assert make(True)(XT, SIGMA).shape == (3, 8, 11)


@pytest.mark.parametrize("conditioned", [False, True])
def test_untrained_model_says_nothing(conditioned):
    model = DiffusionTransformer(ModelConfig(11, 8, 16, 2, 2, 8 * conditioned))
    out = model(XT, SIGMA) if conditioned else model(XT)
    assert (out == 0).all()


def test_positions_and_both_directions_matter():
    model = make()
    out = model(XT)
    assert not torch.allclose(out, model(XT.flip(1)).flip(1), atol=1e-3)
    for changed, seen in ((7, 0), (0, 7)):
        other = XT.clone()
        other[:, changed] = (other[:, changed] + 1) % 11
        assert (model(other)[:, seen] - out[:, seen]).abs().max() > 1e-3


def test_all_masked_places_can_be_told_apart():
    out = make()(torch.full((1, 8), 10))[0]
    assert (out[0] - out[1:]).abs().amax(1).min() > 1e-3


def test_scale_at_the_start_does_not_depend_on_the_shape():
    stds = []
    for dim, depth in ((32, 1), (32, 8), (256, 2)):
        model = DiffusionTransformer(ModelConfig(11, 8, dim, depth, 2))
        model.output_layer.register_forward_pre_hook(lambda _, given: stds.append(given[0].std()))
        model(XT)
    assert len(stds) == 3
    assert all(0.5 < std < 2.5 for std in stds)


def test_sigma_matters_and_rows_are_independent():
    model = make(True)
    out = model(XT[:1].expand(3, -1), SIGMA)
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert (out[1] - out[2]).abs().max() > 1e-3
    torch.testing.assert_close(model(XT, SIGMA)[1:2], model(XT[1:2], SIGMA[1:2]))


@pytest.mark.parametrize("conditioned", [False, True])
def test_bfloat16(conditioned):
    model = make(conditioned).bfloat16()
    out = model(XT, SIGMA) if conditioned else model(XT)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("xt", "error", "text"),
    [
        ([[1, 2]], TypeError, "xt: expected a torch.Tensor, got list"),
        (XT.float(), TypeError, "xt: expected int64 or int32"),
        (XT[0], ValueError, r"xt: expected shape \[B, L\], got \(8,\)"),
        (XT[:, :0], ValueError, r"xt: expected a length in \[1, 8\], got 0"),
        (torch.cat((XT, XT), 1), ValueError, r"xt: expected a length in \[1, 8\], got 16"),
        (XT + 1, ValueError, r"xt: expected ids in \[0, 11\), got 1 to 11"),
        (XT - 1, ValueError, r"xt: expected ids in \[0, 11\), got -1 to 9"),
    ],
)
def test_bad_tokens(xt, error, text):
    with pytest.raises(error, match=text):
        make()(xt)


@pytest.mark.parametrize(
    ("sigma", "error", "text"),
    [
        (None, ValueError, "sigma: this model is conditioned on sigma"),
        (0.5, TypeError, "sigma: expected a torch.Tensor, got float"),
        (torch.ones(3, dtype=torch.int64), TypeError, "sigma: expected floating-point"),
        (SIGMA.unsqueeze(1), ValueError, r"sigma: expected shape \[B\] = \(3,\) or \[B, L\], got \(3, 1\)"),
        (SIGMA - 0.51, ValueError, "sigma: expected >= 0, got -0.5"),
    ],
)
def test_bad_sigma(sigma, error, text):
    with pytest.raises(error, match=text):
        make(True)(XT, sigma)


def test_time_free_model_takes_no_sigma():
    with pytest.raises(ValueError, match="sigma: this model is time-free"):
        make()(XT, SIGMA)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"depth": 0}, ValueError, "depth: expected at least 1, got 0"),
        ({"dim": 16.0}, TypeError, "dim: expected an int, got 16.0"),
        ({"dim": 18}, ValueError, "dim: expected a multiple of 2 x heads = 4, got 18"),
    ],
)
def test_bad_config(changes, error, text):
    with pytest.raises(error, match=text):
        make(**changes)


@pytest.mark.parametrize("conditioned", [False, True])
def test_save_and_load(tmp_path, conditioned):
    model = make(conditioned)
    model.save_pretrained(tmp_path / "deep" / "run", training={"lr": 0.1})
    loaded = DiffusionTransformer.from_pretrained(tmp_path / "deep" / "run")
    assert loaded.config == model.config
    arguments = (XT, SIGMA) if conditioned else (XT,)
    assert torch.equal(loaded(*arguments), model(*arguments))
    assert json.loads((tmp_path / "deep" / "run" / "config.json").read_text())["training"] == {"lr": 0.1}
    assert {p.name for p in (tmp_path / "deep" / "run").iterdir()} == {"config.json", "model.safetensors"}


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_atomically(path, b"old")

    def power_cut(*paths):
        raise OSError("no power")

    monkeypatch.setattr("os.replace", power_cut)
    with pytest.raises(OSError, match="no power"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DiffusionTransformer.from_pretrained(tmp_path / "nowhere")
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected weights, \*\.safetensors"):
        DiffusionTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_cut_weights(tmp_path, kept):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not weights, damaged or cut short"):
        DiffusionTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"model": {"dim": ', "damaged or cut short"),
        ("{}", "not a model's configuration"),
        ("[]", "not a model's configuration"),
        ('{"model": {"num_states": 11, "max_length": 8, "width": 3}}', "unexpected keyword argument 'width'"),
        ('{"model": {"num_states": 11, "max_length": 8, "dim": 0}}', "dim: expected at least 1, got 0"),
    ],
)
def test_bad_config_file(tmp_path, content, text):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        DiffusionTransformer.from_pretrained(tmp_path)


def test_files_that_do_not_belong_together(tmp_path):
    make().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    make(depth=1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ is missing, expected"):
        DiffusionTransformer.from_pretrained(tmp_path)
    make(num_states=12).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=r"3 tensors do not fit; output_layer.\S+ is \(12,\), expected \(11,\)"):
        DiffusionTransformer.from_pretrained(tmp_path)
