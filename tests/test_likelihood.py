"""Likelihoods of texts: how they are cut, that nothing done is lost, and models by their names."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torchrun
from test_published import hub_folder, made, sedd_folder
from typer.testing import CliRunner

from fastdiff import cli, loading, ordered_nll
from fastdiff.data.texts import Bytes, pieces, tokens_of
from fastdiff.loading import Loaded, load, of_config

CPU = torch.device("cpu")
TEXT = "The ship sails näh, and nobody knows why it does.\n" * 12


def tokenizer_folder(folder, mask=None):
    """A byte-pair tokenizer of a few hundred ids, as transformers keeps one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<end>", *([mask] if mask else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", mask_token=mask)
    whole.save_pretrained(folder)
    return whole


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A checkpoint of MDLM with a tokenizer beside it, in the current folder, and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mdlm").mkdir()
    tokenizer = tokenizer_folder(tmp_path / "mdlm")
    hub_folder(tmp_path / "mdlm", "mdlm", made("mdlm", len(tokenizer) + 1))
    (tmp_path / "text.txt").write_text(TEXT)
    return f"eval mdlm:mdlm --mask-index {len(tokenizer)} --data text.txt --num-samples 8 --json out.json"


def invoke(command):
    result = CliRunner().invoke(cli.app, command.split(), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def rows(file="out.json"):
    with open(file) as f:
        return json.load(f)


# ---------------------------------------------------------------------------------------------------------
# Texts.


def test_bytes_and_words_of_tokens(tmp_path):
    tokenizer = tokenizer_folder(tmp_path)
    for of in (tokenizer, Bytes()):
        tokens = tokens_of(of, TEXT.encode())
        end = len(tokens.ids) - (of is tokenizer)
        assert tokens.bytes[0] == tokens.words[0] == 0
        assert (tokens.bytes[-1], tokens.words[-1]) == (len(TEXT.encode()), len(TEXT.split()))
        assert of.decode(tokens.ids[:end].tolist()) == TEXT
        for k in range(0, end, 7):  # a token's bytes are those of the text before it
            before = of.decode(tokens.ids[:k].tolist())
            if "\N{REPLACEMENT CHARACTER}" not in before:
                assert tokens.bytes[k] == len(before.encode())
    assert tokens_of(tokenizer, b"").ids.tolist() == [tokenizer.eos_token_id]


def test_cuts():
    documents = [tokens_of(Bytes(), text) for text in (b"ab cd efg", b"", b"hij k")]

    def cut(*args, **options):
        found = pieces("text", documents, *args, **options)
        return [(bytes(p.context.tolist()), bytes(p.target.tolist()), p.bytes, p.words) for p in found]

    assert cut(4) == [(b"", b"ab c", 4, 2), (b"", b"d ef", 4, 1), (b"", b"ghij", 4, 1)]
    assert cut(4, most=2) == [cut(4)[0], cut(4)[1]]
    assert cut(6, cut="documents") == [(b"", b"ab cd ", 6, 2), (b"", b"efg", 3, 1), (b"", b"hij k", 5, 2)]
    assert cut(6, cut="documents", most=1) == cut(6, cut="documents")[:1]
    sliding = cut(6, cut="sliding", context=2)
    assert sliding[:2] == [(b"", b"ab cd ", 6, 2), (b"d ", b"efgh", 4, 2)]
    assert b"".join(target for _, target, *_ in sliding) == b"ab cd efghij k"
    assert all(given == b"".join(target for _, target, *_ in sliding[:k])[-2:] for k, (given, *_) in enumerate(sliding))
    with pytest.raises(ValueError, match="at least the 99 tokens of a window, got 14"):
        cut(99)


# ---------------------------------------------------------------------------------------------------------
# Evaluations.


def test_numbers_of_a_published_model(published):
    shown = invoke(published)
    (row,) = rows().values()
    assert "perplexity per token" in shown
    assert row["tokens"] == 6 * row["pieces"]
    for name in ("bits_per_byte", "bits_per_token", "perplexity_per_token", "perplexity_per_word"):
        low, high = row[name + "_interval"]
        assert low < row[name] < high
    assert row["bits_per_token"] == pytest.approx(row["nll"] / row["tokens"] / math.log(2))
    assert row["perplexity_per_word"] == pytest.approx(math.exp(row["nll"] / row["words"]))
    for cut in ("documents", "sliding --context 2"):
        invoke(f"{published} --cut {cut} --num-sequences 0")
        assert next(iter(rows().values()))["bytes"] == len(TEXT.encode())


def test_an_evaluation_that_is_killed_goes_on_to_the_same_numbers(published, monkeypatch, tmp_path):
    calls, estimate = [], Loaded.estimate

    def counted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > last:
            raise KeyboardInterrupt
        return estimate(self, *arguments, **options)

    monkeypatch.setattr(Loaded, "estimate", counted)
    last = 999
    invoke(published)
    whole, n, kept = rows(), len(calls), tmp_path / "out.json.0"
    for last, cut_short in ((1, 0), (2, 1)):
        (tmp_path / "out.json").unlink()
        calls.clear()
        CliRunner().invoke(cli.app, published.split())
        assert not (tmp_path / "out.json").exists()
        kept.write_bytes(kept.read_bytes()[: -1 if cut_short else None])  # as a kill may leave it
        calls.clear()
        done, last = last - cut_short, 999
        invoke(published)
        assert rows() == whole
        assert len(calls) == n - done
        assert not kept.exists()


def test_likelihoods_are_named_and_kept_apart(published):
    found = {}
    for kind in ("time-free", "integral"):
        assert ("over time, as published" in invoke(f"{published} --likelihood {kind}")) == (kind == "integral")
        (found[kind],) = rows().values()
        assert found[kind]["likelihood"] == kind
    assert found["time-free"]["nll"] != found["integral"]["nll"]


@pytest.mark.parametrize("kind", ["left-to-right", "confidence", "margin", "entropy"])
def test_along_one_order(published, kind):
    """With a prompt, in blocks; the numbers of `ordered_nll`, without an interval."""
    command = published.replace("--num-samples 8", f"--likelihood {kind} --cut sliding --context 2 --num-sequences 0")
    shown = invoke(f"{command} --tokens-per-step 2 --block-length 3")
    assert f"sliding of 6 tokens, one order, {kind}, 2 a step, blocks of 3" in shown
    assert "masking" not in shown
    (row,) = rows().values()
    assert (row["likelihood"], row["tokens_per_step"], row["block_length"]) == (kind, 2, 3)
    assert not [name for name in row if "interval" in name]
    assert row["bits_per_token"] == pytest.approx(row["nll"] / row["tokens"] / math.log(2))

    model = load("mdlm:mdlm", CPU, mask_index=int(command.split()[3]))
    tokens = tokens_of(model.tokenizer, TEXT.encode())
    nll = passes = 0
    for piece in pieces("text", [tokens], 6, cut="sliding", context=2):
        x0 = torch.cat([piece.context, piece.target]).unsqueeze(0)
        target = torch.arange(x0.shape[1]).unsqueeze(0) >= len(piece.context)
        options = dict(mask_index=model.graph.mask_index, order=kind, tokens_per_step=2, block_length=3)
        estimate = ordered_nll(model.conditionals, x0, target=target, **options)
        nll, passes = nll + estimate.nll.item(), passes + estimate.num_forwards.item()
    assert row["nll"] == pytest.approx(nll, rel=1e-5)
    assert row["network_passes"] == passes

    assert "2 a step" not in invoke(command)
    (by_one,) = rows().values()
    assert by_one["network_passes"] == by_one["tokens"] > passes
    assert by_one["nll"] != row["nll"]


def test_what_was_kept_of_other_settings_is_not_used(published, tmp_path):
    (tmp_path / "out.json.0").write_text(json.dumps(["another", {"0": [1.0] * 6}]))
    invoke(published)
    found = rows()
    invoke(published)
    assert rows() == found


@pytest.mark.slow
def test_the_same_bits_on_any_number_of_ranks(published, tmp_path):
    (tmp_path / "command.txt").write_text(published)
    found = []
    for ranks in (1, 2):
        torchrun.launch(__file__, ranks, "evaluated")
        found.append(rows())
    assert found[0] == found[1]


def evaluated():
    """On one rank of several."""
    with open("command.txt") as file:
        cli.app(file.read().split(), standalone_mode=False)


# ---------------------------------------------------------------------------------------------------------
# Names.


def test_models_of_transformers(tmp_path, monkeypatch):
    from transformers import BertConfig, BertForMaskedLM

    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizer_folder(tmp_path / "bert", mask="<mask>")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape)).eval()
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text(TEXT)
    scored = load("hf:bert", CPU)
    assert (scored.length, scored.front) == (32, [])
    assert (scored.graph.mask_index, scored.exclude_mask) == (tokenizer.mask_token_id, False)
    larger = tokenizer_folder(tmp_path / "larger", mask="<mask>")
    larger.add_tokens(["<one more>"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="tokenizer: expected at most the model's"):
        load("hf:bert", CPU, tokenizer="larger")
    invoke("eval hf:bert --data text.txt --length 12 --num-samples 8 --num-sequences 4 --json out.json")
    (row,) = rows().values()
    assert (row["pieces"], row["tokens"]) == (4, 48)


CONFIGS = {  # what those of published models say: mask, longest sequence, whether logits are shifted
    "LLaDA": (dict(model_type="llada", mask_token_id=126336, max_sequence_length=4096), 126336, 4096, False),
    "LLaDA-MoE": (dict(model_type="lladamoe", max_position_embeddings=4096), None, 4096, False),
    "Dream": (dict(model_type="Dream", mask_token_id=151666, max_position_embeddings=131072), 151666, 131072, True),
    "A2D": (dict(model_type="a2d-qwen3", max_position_embeddings=40960), None, 40960, False),
    "BERT": (dict(model_type="bert", max_position_embeddings=512), None, 512, False),
    "no length": (dict(model_type="other", mask_token_id=3), 3, None, False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_configs_say(name):
    said, mask_index, length, shift = CONFIGS[name]
    found = of_config(SimpleNamespace(**said))
    assert found == dict(mask_index=mask_index, max_length=length, shift=shift, exclude_mask=False)


def test_what_is_asked_for(tmp_path, monkeypatch):
    """Lengths, shift, the mask: of learned positions (BERT) and of rotary ones (ModernBERT)."""
    import transformers

    monkeypatch.chdir(tmp_path)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    special = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0)
    for kind in ("Bert", "ModernBert"):
        tokenizer = tokenizer_folder(tmp_path / kind)
        config = dict(vocab_size=len(tokenizer) + 1, max_position_embeddings=8, **shape, **special)
        model = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**config))
        model.save_pretrained(tmp_path / kind)
    mask = dict(mask_index=len(tokenizer))
    with pytest.raises(ValueError, match="mask_index: expected an id, for neither model nor tokenizer of Bert has"):
        load("hf:Bert", CPU)
    loaded = load("hf:Bert", CPU, **mask)
    assert (loaded.length, loaded.exclude_mask, loaded.conditionals) == (8, False, loaded.network)
    assert load("hf:Bert", CPU, exclude_mask=True, **mask).exclude_mask
    with pytest.raises(ValueError, match="length: expected 1 to 8 tokens, got 9"):
        load("hf:Bert", CPU, length=9, **mask)
    with pytest.warns(UserWarning, match="length: ModernBert was made for 8 tokens, got 9"):
        assert load("hf:ModernBert", CPU, length=9, **mask).length == 9
    with pytest.raises(ValueError, match="expected a tokenizer with a BOS"):
        load("hf:Bert", CPU, shift=True, **mask)
    tokenizer.add_special_tokens(dict(bos_token="<end>"))
    tokenizer.save_pretrained(tmp_path / "Bert")
    loaded = load("hf:Bert", CPU, shift=True, **mask)
    assert (loaded.length, loaded.front) == (7, [tokenizer.bos_token_id])
    xt = torch.randint(9, (2, 5))
    assert torch.equal(loaded.conditionals(xt)[:, 1:], loaded.network(xt).logits[:, :-1])
    with pytest.raises(ValueError, match="shift: expected none for mdlm:x"):
        load("mdlm:x", CPU, shift=True)
    monkeypatch.setattr(loading, "of_config", lambda config: of_config(config) | dict(max_length=None))
    with pytest.raises(ValueError, match="length: expected one, for Bert does not say how many tokens it takes"):
        load("hf:Bert", CPU, **mask)
    assert load("hf:Bert", CPU, length=5, **mask).length == 5
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        load("hf:Bert", CPU, length=0, **mask)


def test_models_of_transformers_that_are_refused(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("causal")
    with pytest.raises(ValueError, match="causal: expected a masked model whose output has logits, got a LlamaModel"):
        load("hf:causal", CPU)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained("cut")
    weights = load_file("cut/model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    del weights[name]
    save_file(weights, "cut/model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=f"cut: 1 tensors of the model are not in its files; {name} is missing"):
        load("hf:cut", CPU)


def test_texts_of_a_published_model(published):
    """Of its conditionals, or of its scores where a sampler asks for these."""
    words, last = published.split(), []
    for sampler in ("confidence", "tweedie"):
        shown = invoke(f"sample mdlm:mdlm {' '.join(words[2:4])} --sampler {sampler} --length 6 --prompt The --show")
        assert shown.startswith("   0  The")
        last.append(shown.splitlines()[0].count("·"))
    assert last[0] == last[1] > 0


def test_names_of_nothing(tmp_path, published):
    def fail(name, match, **options):
        with pytest.raises((ValueError, OSError), match=match):
            load(name, CPU, **options)

    fail("nowhere", "no such file: nowhere/config.json")
    fail("sedd:nowhere", "no such file: nowhere")
    (tmp_path / "sedd").mkdir()
    sedd_folder(tmp_path / "sedd", "sedd", made("sedd"))
    fail("sedd:sedd", "tokenizer: found none in sedd")
    fail("sedd:sedd", r"tokenizer: expected at most the model's 19 ids, got \d+", tokenizer="mdlm")
    fail("mdlm:mdlm", "mask_index: expected an id")
    without = published.replace("--data text.txt", "").split()
    assert "data: expected texts, for mdlm:mdlm has none" in str(CliRunner().invoke(cli.app, without).exception)


if __name__ == "__main__":
    torchrun.run(globals())
