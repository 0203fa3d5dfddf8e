"""lm-evaluation-harness, offline: tasks of a few documents, a small model on bytes that was never trained."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval, in the extra lm-eval, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast  # noqa: E402

from fastdiff import cli, conditional_nll, exact_nll, sample, time_free_nll  # noqa: E402
from fastdiff.data import encode  # noqa: E402
from fastdiff.integrations.lm_eval import Bytes, FastdiffLM  # noqa: E402
from fastdiff.integrations.transformers import FastdiffConfig, FastdiffForMaskedLM  # noqa: E402
from fastdiff.model import DiffusionTransformer, ModelConfig  # noqa: E402

M, L = 256, 24


def thin(num_states=M + 1, sigma_conditioned=False):
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(num_states, L, 16, 1, 2, 8 * sigma_conditioned))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def harness(model=None, **options):
    model = thin() if model is None else model
    return FastdiffLM(model, Bytes(), **(dict(mask_index=M, exclude_mask=True, num_samples=20, device="cpu") | options))


def requests(kind, *arguments, doc_ids=None):
    ids = range(len(arguments)) if doc_ids is None else doc_ids
    return [
        Instance(kind, {}, args, k, ("task", doc, 1)) for k, (args, doc) in enumerate(zip(arguments, ids, strict=True))
    ]


WORDS = ("[UNK]", "[CLS]", "[SEP]", "[MASK]", "sky", "grass", "is", "blue", "green", "never", "(", ")", "()")
IDS = {word: k for k, word in enumerate(WORDS)}
CHOICES = ("output_type: multiple_choice", 'doc_to_text: "{{question}}"', 'doc_to_choice: "{{choices}}"')
CHOICES += ("doc_to_target: gold", "metric_list: [{metric: acc}, {metric: acc_norm}]")


def words(template="$A"):
    """A tokenizer of words that adds what the template says."""
    tokenizer = Tokenizer(models.WordLevel(IDS, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, IDS[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    names = dict(bos_token="[CLS]", eos_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokens(text):
    return torch.tensor([IDS[word] for word in text.split()], dtype=torch.int64)


def direct(model, context, target, name=0, **options):
    """The nll of conditional_nll, as the harness is to name it."""
    options = dict(mask_index=IDS["[MASK]"], num_samples=20, exclude_mask=False) | options
    return conditional_nll(model, [context], [target], sample_ids=torch.tensor([name]), **options).nll.item()


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates a task of the given fields over documents of a local file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(lm, documents, *fields, **options):
        (tmp_path / "documents.json").write_text("\n".join(map(json.dumps, documents)))
        head = ("task: tiny", "dataset_path: json", f"dataset_kwargs: {{data_files: {tmp_path}/documents.json}}")
        text = (*head, "test_split: train", "num_fewshot: 0", *fields)
        (tmp_path / "tiny.yaml").write_text("\n".join(text) + "\n")
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return simple_evaluate(lm, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0, **options)

    return run


def test_multiple_choice_keeps_the_errors(evaluate):
    lm, model = harness(), thin()
    documents = [dict(question=q, choices=["red", "green"], gold=k) for k, q in enumerate(("Ruby is", "Grass is"))]
    fields = ('doc_to_text: "{{question}}"', 'doc_to_choice: "{{choices}}"', "doc_to_target: gold")
    results = evaluate(lm, documents, "output_type: multiple_choice", *fields)
    assert 0 <= results["results"]["tiny"]["acc,none"] <= 1
    rows = results["config"]["likelihoods"]
    assert [(row["task"], row["doc_id"], row["idx"]) for row in rows] == [
        ("tiny", d, k) for d in (0, 1) for k in (0, 1)
    ]
    json.dumps(results["config"]["likelihoods"])
    logged = results["samples"]["tiny"]
    for row in rows:
        question, answer = documents[row["doc_id"]]["question"], " " + documents[0]["choices"][row["idx"]]
        log_likelihood, _ = logged[row["doc_id"]]["resps"][row["idx"]][0]
        assert log_likelihood == -row["nll"]
        truth = exact_nll(
            model,
            encode(question + answer).unsqueeze(0),
            mask_index=M,
            target=torch.arange(len(question + answer)).unsqueeze(0) >= len(question),
        )
        assert row["num_tokens"] == len(answer)
        assert abs(row["nll"] - truth.nll.item()) <= max(5 * row["stderr"], 1e-4)
        assert (row["stderr"] > 0) == (2 ** len(answer) - 1 > 20)  # red is enumerated, green is not


def test_perplexity_and_generation(evaluate):
    lm = harness()
    text = "a text that is longer than the model takes"
    fields = ('doc_to_text: ""', 'doc_to_target: "{{text}}"', "metric_list: [{metric: bits_per_byte}]")
    results = evaluate(lm, [dict(text=text)], "output_type: loglikelihood_rolling", *fields)
    (row,) = results["config"]["likelihoods"]
    assert row["num_tokens"] == len(text)
    bits = results["results"]["tiny"]["bits_per_byte,none"]
    assert bits == pytest.approx(row["nll"] / len(text) / math.log(2))

    fields = ('doc_to_text: "{{text}}"', 'doc_to_target: "b"', "generation_kwargs: {until: [], max_gen_toks: 6}")
    results = evaluate(lm, [dict(text="ab")], "output_type: generate_until", *fields)
    drawn = sample(thin(), prompt=encode("ab"), length=8, sampler="confidence", temperature=0)
    assert results["samples"]["tiny"][0]["resps"] == [[Bytes().decode(drawn[0, 2:].tolist())]]


def test_a_likelihood_does_not_depend_on_its_company():
    pairs = [("Q", " one"), ("A question", " of length"), ("", "nothing before"), ("Q", " two")]
    together = harness().loglikelihood(requests("loglikelihood", *pairs))
    for k, pair in enumerate(pairs):
        (alone,) = harness(batch_size=3).loglikelihood(requests("loglikelihood", pair, doc_ids=[k]))
        assert alone == pytest.approx(together[k], rel=1e-6)
        estimate = conditional_nll(
            thin(), [encode(pair[0])], [encode(pair[1])], mask_index=M, num_samples=20, sample_ids=torch.tensor([k])
        )
        assert together[k][0] == pytest.approx(-estimate.nll.item(), rel=1e-6)


def test_answers_of_a_document_share_their_masks():
    """The noise in which of two answers is likelier cancels where they agree."""
    pairs = [("Q", " the same long answer"), ("Q", " the same long answer")]
    for shared, doc_ids in ((True, [5, 5]), (False, [5, 6])):
        (a, _), (b, _) = harness().loglikelihood(requests("loglikelihood", *pairs, doc_ids=doc_ids))
        assert (a == b) == shared


def test_spaces_belong_to_the_continuation_and_long_contexts_lose_their_start():
    lm = harness()
    spaced, moved = lm.loglikelihood(requests("loglikelihood", ("Q: ", "yes"), ("Q:", " yes"), doc_ids=[0, 0]))
    assert spaced == moved
    long, cut = lm.loglikelihood(requests("loglikelihood", ("x" * 99 + "Q:", " yes"), ("x" * 18 + "Q:", " yes")))
    assert long == cut  # both enumerated
    with pytest.raises(ValueError, match="continuation: expected 1 to max_length = 24 tokens, got 25"):
        lm.loglikelihood(requests("loglikelihood", ("Q", "x" * 25)))


def test_windows_of_a_long_text():
    """Each token once; the last window is filled up with tokens before it."""
    text = "0123456789" * 6
    (log_likelihood,) = harness().loglikelihood_rolling(requests("loglikelihood_rolling", (text,), doc_ids=[2]))
    tokens, name = encode(text), 2 * 2**20
    options = dict(mask_index=M, num_samples=20)
    whole = [
        time_free_nll(thin(), tokens[k : k + L].unsqueeze(0), sample_ids=torch.tensor([name + j]), **options)
        for j, k in enumerate((0, L))
    ]
    rest = conditional_nll(thin(), [tokens[36:48]], [tokens[48:]], sample_ids=torch.tensor([name + 2]), **options)
    estimates = [*whole, rest]
    assert log_likelihood == pytest.approx(-sum(e.nll.item() for e in estimates), rel=1e-6)
    lm = harness()
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), doc_ids=[2]))
    assert lm.likelihoods[0]["stderr"] == pytest.approx(math.hypot(*(e.stderr.item() for e in estimates)), rel=1e-5)


def test_greedy_targets():
    """What is generated by confidence is greedy; with another token it is not."""
    drawn = sample(thin(), prompt=encode("Q"), length=5, sampler="confidence", temperature=0)[0, 1:]

    class Numbers(Bytes):
        """Bytes that need not be text."""

        def encode(self, text, add_special_tokens=True):
            return list(text.encode("latin-1"))

    good = bytes(drawn.tolist()).decode("latin-1")
    bad = good[:-1] + chr((ord(good[-1]) + 1) % 256)
    lm = FastdiffLM(thin(), Numbers(), mask_index=M, exclude_mask=True, num_samples=20, device="cpu")
    asked = requests("loglikelihood", ("Q", good), ("Q", bad))
    assert [greedy for _, greedy in lm.loglikelihood(asked)] == [True, False]
    lm.is_check_greedy = False
    assert [greedy for _, greedy in lm.loglikelihood(asked)] == [False, False]


def test_generation_stops_and_repeats():
    lm = harness(max_gen_toks=8, steps=4, block_length=4)
    options = dict(until=[], do_sample=True, temperature=1.0)
    first, second = lm.generate_until(requests("generate_until", ("Q", options), ("Q", options)))
    assert first != second
    stop = first[2]
    (stopped,) = lm.generate_until(requests("generate_until", ("Q", options | dict(until=[stop]))))
    assert stopped == first[: first.index(stop)]
    with pytest.raises(ValueError, match="max_gen_toks: expected less than max_length = 24, got 24"):
        lm.generate_until(requests("generate_until", ("Q", dict(until=[], max_gen_toks=24))))


def test_the_end_of_a_text_ends_it():
    drawn = sample(thin(), prompt=encode("Q"), length=9, sampler="confidence", temperature=0)[0, 1:].tolist()
    lm = harness(max_gen_toks=8)
    lm.tokenizer.eos_token_id = drawn[3]
    expected = Bytes().decode(drawn[: drawn.index(drawn[3])])
    assert lm.generate_until(requests("generate_until", ("Q", dict(until=[])))) == [expected]


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


# -- tokenizers and models that have conventions of their own ------------------------------------------------


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


# -- the harness's runs ---------------------------------------------------------------------------------------

QUESTIONS = [
    dict(question=question, choices=["red", "green and blue", "no"], gold=gold)
    for question, gold in (("Ruby", 2), ("Peas", 1), ("Snow", 2))
]


def test_accuracies_are_those_of_direct_scoring(evaluate):
    results = evaluate(harness(batch_size="auto"), QUESTIONS, *CHOICES)["results"]["tiny"]
    right = {"acc,none": 0, "acc_norm,none": 0}
    for doc_id, doc in enumerate(QUESTIONS):
        pairs = [(encode(doc["question"]), encode(" " + choice)) for choice in doc["choices"]]
        nll = torch.tensor([direct(thin(), *pair, doc_id, mask_index=M, exclude_mask=True) for pair in pairs])
        lengths = torch.tensor([len(choice) for choice in doc["choices"]])
        right["acc,none"] += int(nll.argmin() == doc["gold"])
        right["acc_norm,none"] += int((nll / lengths).argmin() == doc["gold"])
    assert right["acc,none"] != right["acc_norm,none"]
    assert {name: results[name] for name in right} == {name: n / len(QUESTIONS) for name, n in right.items()}


def test_a_ranking_of_prompts_and_answers_is_the_harness_s(evaluate, tmp_path, monkeypatch):
    """The command's accuracies of the same pairs are acc and acc_bytes; all answers are short and enumerated."""
    choices = ["red", "ochre", "no", "n\N{LATIN SMALL LETTER A WITH DIAERESIS}h"]
    documents = [dict(question=f"Q{k}", choices=choices, gold=(2, 1, 2)[k % 3]) for k in range(6)]
    fields = (*CHOICES[:-1], "metric_list: [{metric: acc}, {metric: acc_bytes}]")
    results = evaluate(harness(num_samples=63), documents, *fields)
    lines = [
        dict(prompt=one["question"], answers=[" " + choice for choice in choices], right=one["gold"])
        for one in documents
    ]
    monkeypatch.chdir(tmp_path)
    thin().save_pretrained("run")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = "answers run --data pairs.jsonl --num-samples 63 --json out.json --device cpu"
    cli.app(command.split(), standalone_mode=False)
    found = json.loads((tmp_path / "out.json").read_text())
    rows = results["config"]["likelihoods"]
    assert [a["nll"] for record in found["records"] for a in record["answers"]] == pytest.approx(
        [r["nll"] for r in rows]
    )
    accuracies = [found["accuracy"][by]["accuracy"] for by in ("by_nll", "by_nll_per_byte")]
    assert accuracies == [results["results"]["tiny"][name + ",none"] for name in ("acc", "acc_bytes")]
    assert 0 < accuracies[0] != accuracies[1] > 0


def test_chats(evaluate):
    """The harness's prompt is the template's, which has the BOS that the tokenizer would put in front; once."""
    model, tokenizer = thin(len(WORDS)), words("[CLS] $A")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} is{% endif %}"
    )
    lm = FastdiffLM(model, tokenizer, exclude_mask=False, num_samples=20)
    fields = (*CHOICES[:-1], "metric_list: [{metric: acc}]")
    documents = [dict(question="grass", choices=[" green", " never blue"], gold=0)]
    results = evaluate(lm, documents, *fields, apply_chat_template=True, system_instruction="sky")
    asked = tokens("[CLS] [UNK] sky [UNK] grass is")
    nll = [row["nll"] for row in results["config"]["likelihoods"]]
    expected = [direct(model, asked, tokens(text)) for text in ("green", "never blue")]
    assert nll == pytest.approx(expected, rel=1e-6)
    assert (lm.chat_template(True), lm.tokenizer_name) == (tokenizer.chat_template, "")
    assert lm.apply_chat_template([dict(role="assistant", content="sky")], False) == "[CLS] assistant sky"
    with pytest.raises(ValueError, match="chat: expected a tokenizer with a chat template, got one without"):
        evaluate(harness(), QUESTIONS, *CHOICES, apply_chat_template=True)


def test_perplexities_are_those_of_direct_scoring(evaluate):
    texts = ["a text that is longer than the model takes", "", "and one more"]
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    fields = (
        'doc_to_text: ""',
        'doc_to_target: "{{text}}"',
        f"metric_list: [{', '.join(f'{{metric: {n}}}' for n in names)}]",
    )
    results = evaluate(harness(), [dict(text=text) for text in texts], "output_type: loglikelihood_rolling", *fields)
    first, _, last = map(encode, texts)
    windows = (first[:0], first[:L], 0), (first[42 - L : L], first[L:], 1), (last[:0], last, 2 * 2**20)
    nll = sum(direct(thin(), *window, mask_index=M, exclude_mask=True) for window in windows)
    per_byte, per_word = nll / sum(map(len, texts)), nll / sum(len(text.split(" ")) for text in texts)
    expected = (math.exp(per_word), math.exp(per_byte), per_byte / math.log(2))
    got = [results["results"]["tiny"][f"{name},none"] for name in names]
    assert got == pytest.approx(expected, rel=1e-6)
    assert [row["nll"] == 0 for row in results["config"]["likelihoods"]] == [False, True, False]


def test_limit_and_a_resumed_run_change_no_number(evaluate, tmp_path):
    whole = evaluate(harness(), QUESTIONS, *CHOICES)
    part = evaluate(harness(), QUESTIONS, *CHOICES, limit=2)
    rows = whole["config"]["likelihoods"]
    assert part["config"]["likelihoods"] == [pytest.approx(row) for row in rows[:6]]

    class Interrupted(FastdiffLM):
        def _is_greedy(self, context, target):
            if target.shape[1] > 4:
                raise KeyboardInterrupt
            return super()._is_greedy(context, target)

    cache = dict(use_cache=str(tmp_path / "cache"))
    options = dict(mask_index=M, exclude_mask=True, num_samples=20)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(thin(), Bytes(), **options), QUESTIONS, *CHOICES, **cache)
    resumed = evaluate(harness(), QUESTIONS, *CHOICES, **cache)
    assert resumed["results"] == whole["results"]
    assert resumed["config"]["likelihoods"] == [pytest.approx(row) for row in rows if row["num_tokens"] > 4]


def test_generations_do_not_depend_on_their_order():
    options = dict(until=[], do_sample=True, temperature=1.0, max_gen_toks=8)
    asked = requests("generate_until", ("Q", options), ("A", options), ("A", options), doc_ids=[0, 1, 1])
    lm = harness(steps=4)
    one, first, second = lm.generate_until(asked)
    assert first != second
    assert lm.generate_until(asked[1:] + asked[:1]) == [first, second, one]


def test_options_that_are_strings():
    as_strings = "num_samples=20,seed=1e3,proposal=systematic,tolerance=2,max_samples=40,max_gen_toks=4,steps=none"
    lm = FastdiffLM.create_from_arg_obj(
        dict(option.split("=") for option in as_strings.split(",")) | dict(exclude_mask="True", mask_index=str(M)),
        dict(pretrained=thin(), tokenizer=Bytes(), batch_size="auto:4", device="cpu"),
    )
    context, target, doc_id = encode("Q"), encode(" a long answer"), 3
    options = dict(num_samples=20, seed=1000, proposal="systematic", tolerance=2.0, max_samples=40)
    expected = direct(thin(), context, target, doc_id, mask_index=M, exclude_mask=True, **options)
    (scored,) = lm.loglikelihood(requests("loglikelihood", ("Q", " a long answer"), doc_ids=[doc_id]))
    assert scored[0] == pytest.approx(-expected, rel=1e-6)
    info = dict(lm.get_model_info(), likelihoods=None)
    assert info == dict(options, likelihoods=None, mask_index=M, exclude_mask=True, shift=False)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("num_samples", "many", "int >= 1, got 'many'"),
        ("num_samples", 6.5, "int >= 1, got 6.5"),
        ("num_samples", True, "int >= 1, got True"),
        ("num_samples", 0, "int >= 1, got 0"),
        ("mask_index", "-1", "int >= 0, got '-1'"),
        ("seed", "0.5", "int >= 0, got '0.5'"),
        ("seed", "none", "int >= 0, got 'none'"),
        ("max_samples", math.inf, "int >= 1, got inf"),
        ("tolerance", "half", "float >= 0, got 'half'"),
        ("tolerance", "nan", "float >= 0, got 'nan'"),
        ("batch_size", "big", "int >= 1, got 'big'"),
        ("exclude_mask", "no", "True or False, got 'no'"),
        ("is_check_greedy", 1, "True or False, got 1"),
        ("trust_remote_code", "perhaps", "True or False, got 'perhaps'"),
        (
            "proposal",
            "stratifed",
            "one of 'stratified', 'systematic', 'complementary', 'uniform', 'harmonic', got 'stratifed'",
        ),
    ],
)
def test_options_of_no_use(option, value, expected):
    with pytest.raises(ValueError, match=f"{option}: expected {expected}"):
        harness(**{option: value})


def test_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: expected 1, for one process evaluates, got 2"):
        FastdiffLM(str(tmp_path))
