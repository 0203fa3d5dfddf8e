"""lm-evaluation-harness: folders, models and tokenizers that have conventions of their own."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval, in the extra lm-eval, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from harness import IDS, WORDS, L, M, direct, harness, requests, thin, tokens, words  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast  # noqa: E402

from fastdiff import conditional_nll, sample  # noqa: E402
from fastdiff.integrations.lm_eval import Bytes, FastdiffLM  # noqa: E402
from fastdiff.integrations.transformers import FastdiffConfig, FastdiffForMaskedLM  # noqa: E402


@pytest.mark.parametrize("sigma_conditioned", [False, True])
def test_folder_of_a_run(tmp_path, sigma_conditioned):
    model = thin(sigma_conditioned=sigma_conditioned)
    model.save_pretrained(tmp_path)
    lm = FastdiffLM.create_from_arg_string(
        f"pretrained={tmp_path},num_samples=20", dict(batch_size="auto", device="cpu", max_batch_size=None)
    )
    (scored,) = lm.loglikelihood(requests("loglikelihood", ("Q", " answer")))
    if not sigma_conditioned:
        assert scored == harness().loglikelihood(requests("loglikelihood", ("Q", " answer")))[0]
    thin(num_states=M).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pretrained: expected a model of bytes and a mask"):
        FastdiffLM(str(tmp_path))
    model.save_pretrained(tmp_path, training={"block_length": 4})
    with pytest.raises(ValueError, match="pretrained: expected a model of whole sequences, got one of blocks"):
        FastdiffLM(str(tmp_path))
    model.save_pretrained(tmp_path, training={"loss": "gidd"})
    with pytest.raises(ValueError, match="pretrained: expected a model of masks, got one of masks and uniform noise"):
        FastdiffLM(str(tmp_path))


def test_folder_of_transformers(tmp_path):
    letters = {letter: k for k, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model = FastdiffForMaskedLM(FastdiffConfig(M + 1, L, 16, 1, 2))
    model.transformer.load_state_dict(thin().state_dict())
    model.save_pretrained(tmp_path)
    lm = lm_eval.api.registry.get_model("fastdiff")(str(tmp_path), num_samples=20, device="cpu")
    assert (lm.max_length, lm.shared) == (L, dict(mask_index=M, exclude_mask=False))
    (scored,) = lm.loglikelihood(requests("loglikelihood", ("Q", " answer")))
    context, target = ([letters["Ġ" if c == " " else c] for c in text] for text in ("Q", " answer"))
    given = [torch.tensor([tokens]) for tokens in (context, target)]
    expected = conditional_nll(thin(), *given, mask_index=M, num_samples=20, exclude_mask=False)
    assert scored[0] == pytest.approx(-expected.nll.item(), rel=1e-6)
    assert lm.generate_until(requests("generate_until", ("Q", dict(until=[], max_gen_toks=4))))[0]


REMOTE = """
from transformers import PretrainedConfig, PreTrainedModel
from fastdiff.integrations.transformers import FastdiffConfig, FastdiffForMaskedLM

class RemoteConfig(FastdiffConfig):
    model_type = "remote"

class RemoteModel(FastdiffForMaskedLM):
    config_class = RemoteConfig
"""


def test_code_of_a_folder_runs_when_it_is_trusted_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "modules"), *sys.path])
    folder = tmp_path / "folder"
    FastdiffForMaskedLM(FastdiffConfig(len(WORDS), L, 16, 1, 2, mask_token_id=IDS["[MASK]"])).save_pretrained(folder)
    words().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = dict(AutoConfig="remote.RemoteConfig", AutoModel="remote.RemoteModel")
    (folder / "config.json").write_text(json.dumps(config | dict(model_type="remote", auto_map=code)))
    (folder / "remote.py").write_text(REMOTE)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        FastdiffLM(str(folder), device="cpu")
    for trust in ("pretrained={},trust_remote_code=True", "pretrained={},trust_remote_code=true"):
        lm = FastdiffLM.create_from_arg_string(trust.format(folder), dict(device="cpu"))
        assert type(lm.model).__name__ == "RemoteModel"
        assert "trust_remote_code" not in lm.get_model_info()


def test_what_a_model_does_not_say():
    with pytest.raises(ValueError, match="mask_index: expected one, for the model comes with none"):
        FastdiffLM(thin(), Bytes())
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        FastdiffLM(thin(), mask_index=M)
    with pytest.raises(ValueError, match="max_length: expected one"):
        FastdiffLM(thin().forward, Bytes(), mask_index=M)


@pytest.mark.parametrize("template", ["$A", "[CLS] $A", "$A [SEP]", "[CLS] $A [SEP]"])
def test_what_a_tokenizer_adds_is_not_scored(template):
    """In front it is context, behind it is left out."""
    model = thin(len(WORDS))
    front = tokens("[CLS]" if "[CLS]" in template else "")
    lm = FastdiffLM(model, words(template), exclude_mask=False, num_samples=20)
    assert lm.shared["mask_index"] == IDS["[MASK]"]
    pairs = [("sky is", " blue"), ("grass", " is never blue"), ("", "grass is green")]
    scored = lm.loglikelihood(requests("loglikelihood", *pairs))
    for k, (context, target) in enumerate(pairs):
        expected = direct(model, torch.cat([front, tokens(context)]), tokens(target), k)
        assert scored[k][0] == pytest.approx(-expected, rel=1e-6)
    text = " ".join(["sky is blue"] * 9)
    size = L - len(front)
    windows = (front, tokens(text)[:size]), (torch.cat([front, tokens(text)[27 - size : size]]), tokens(text)[size:])
    expected = sum(direct(model, *window, name) for name, window in enumerate(windows))
    (rolled,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert rolled == pytest.approx(-expected, rel=1e-6)
    assert lm.likelihoods[-1]["num_tokens"] == 27
    (text,) = lm.generate_until(requests("generate_until", ("sky is", dict(until=[], max_gen_toks=4))))
    prompt = torch.cat([front, tokens("sky is")])
    options = dict(sampler="confidence", temperature=0, mask_index=IDS["[MASK]"], exclude_mask=False)
    drawn = sample(model, prompt=prompt, length=len(prompt) + 4, **options)[0, len(prompt) :].tolist()
    drawn = drawn[: drawn.index(IDS["[SEP]"])] if IDS["[SEP]"] in drawn else drawn
    assert text == words().decode(drawn, skip_special_tokens=True)


def test_a_bos_that_is_asked_for():
    model, context, target = thin(len(WORDS)), tokens("sky is"), tokens("never blue")
    for template, add_bos_token, front in (("$A", True, "[CLS]"), ("[CLS] $A", True, "[CLS]"), ("[CLS] $A", False, "")):
        lm = FastdiffLM(model, words(template), exclude_mask=False, add_bos_token=add_bos_token)
        (scored,) = lm.loglikelihood(requests("loglikelihood", ("sky is", " never blue")))
        expected = direct(model, torch.cat([tokens(front), context]), target)
        assert scored[0] == pytest.approx(-expected, rel=1e-6)
    with pytest.raises(ValueError, match="add_bos_token: expected a tokenizer that has a BOS"):
        harness(add_bos_token=True)


def test_a_token_of_context_and_continuation_is_scored():
    letters = {letter: k for k, letter in enumerate("xy()")} | {"()": 4}
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [("(", ")")])))
    model = thin(6)
    lm = FastdiffLM(model, merging, mask_index=5)
    (scored,) = lm.loglikelihood(requests("loglikelihood", ("xy(", ")x")))
    expected = direct(model, torch.tensor([0, 1]), torch.tensor([4, 0]), mask_index=5, exclude_mask=True)
    assert scored[0] == pytest.approx(-expected, rel=1e-6)


class _DreamConfig(FastdiffConfig):
    model_type = "Dream"

    def __init__(self, **options):
        super().__init__(**options)


class _DreamModel(FastdiffForMaskedLM):
    """As Dream's, the logits at i are of token i + 1."""

    config_class = _DreamConfig

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits.roll(-1, 1)
        return output


AutoConfig.register("Dream", _DreamConfig)
AutoModel.register(_DreamConfig, _DreamModel)


@pytest.mark.parametrize("given", ["folder", "model", "pair"])
def test_shifted_logits(given, tmp_path):
    model, mask = thin(len(WORDS)), IDS["[MASK]"]
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = _DreamConfig(vocab_size=len(WORDS), max_position_embeddings=L, mask_token_id=mask, **shape)
    dream = _DreamModel(config)
    dream.transformer.load_state_dict(model.state_dict())
    dream.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    options = dict(exclude_mask=False, num_samples=20, device="cpu", max_gen_toks=4)
    if given == "folder":
        lm = FastdiffLM(str(tmp_path), **options)
    elif given == "model":
        lm = FastdiffLM(dream, words(), **options)
    else:
        body = (lambda xt: model.body(xt).roll(-1, 1)), model.lm_head
        lm = FastdiffLM(body, words(), max_length=L, shift=True, **options)
    context, target = tokens("sky is"), tokens("never blue")
    (scored,) = lm.loglikelihood(requests("loglikelihood", ("sky is", " never blue")))
    assert scored[0] == pytest.approx(-direct(model, context, target), rel=1e-6)
    options = dict(sampler="confidence", temperature=0, mask_index=mask, exclude_mask=False)
    drawn = sample(model, prompt=context, length=6, **options)[0, 2:].tolist()
    assert lm.generate_until(requests("generate_until", ("sky is", dict(until=[])))) == [words().decode(drawn)]

    for ask, kind, arguments in (
        (lm.loglikelihood, "loglikelihood", ("", "sky")),
        (lm.loglikelihood, "loglikelihood", ("is", " sky" * L)),
        (lm.loglikelihood_rolling, "loglikelihood_rolling", ("sky",)),
        (lm.generate_until, "generate_until", ("", dict(until=[]))),
    ):
        with pytest.raises(ValueError, match="context: expected a token, for shifted logits predict no first one"):
            ask(requests(kind, arguments))
    if given == "model":
        lm = FastdiffLM(dream, words(), exclude_mask=False, add_bos_token=True)
        (rolled,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("sky is",)))
        assert rolled == pytest.approx(-direct(model, tokens("[CLS]"), tokens("sky is")), rel=1e-6)


def test_what_a_model_says():
    """And what it does not mean: max_length of transformers' configs is a default of generation."""
    network, network_of_bytes = torch.nn.Linear(1, 1), thin()
    lm = FastdiffLM(network_of_bytes, Bytes(), mask_index=M)
    assert (lm.max_length, lm.shared["exclude_mask"], lm.shift) == (L, True, False)
    network.config = SimpleNamespace(max_length=20, max_sequence_length=4096, mask_token_id=7, model_type="llada")
    lm = FastdiffLM(network, Bytes())
    assert (lm.max_length, lm.shared, lm.shift) == (4096, dict(mask_index=7, exclude_mask=False), False)
    with pytest.raises(ValueError, match=r"mask_index: expected one, for config and tokenizer disagree: \[3, 7\]"):
        FastdiffLM(network, words())
    assert FastdiffLM(network, words(), mask_index=5).shared["mask_index"] == 5
    network.config = SimpleNamespace(max_length=20, mask_token_id=7)
    with pytest.raises(ValueError, match="max_length: expected one"):
        FastdiffLM(network, Bytes())


def test_tokens_go_where_the_model_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert FastdiffLM(thin(), Bytes(), mask_index=M).device.type == "cpu"
    assert FastdiffLM(thin().forward, Bytes(), mask_index=M, max_length=L).device.type == "cuda"
