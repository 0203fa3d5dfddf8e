"""lm-evaluation-harness, offline: tasks of a few documents, a small model on bytes that was never trained."""

import json
import math

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval, in the extra lm-eval, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from fastdiff import conditional_nll, exact_nll, sample, time_free_nll  # noqa: E402
from fastdiff.data import encode  # noqa: E402
from fastdiff.integrations.lm_eval import Bytes, FastdiffLM  # noqa: E402
from fastdiff.integrations.transformers import FastdiffConfig, FastdiffForMaskedLM  # noqa: E402
from fastdiff.model import DiffusionTransformer, ModelConfig  # noqa: E402

M, L = 256, 24


def thin(num_states=M + 1, sigma_conditioned=False):
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(num_states, L, 16, 1, 2, sigma_conditioned))
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


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates a task of the given fields over documents of a local file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(lm, documents, *fields):
        (tmp_path / "documents.json").write_text("\n".join(map(json.dumps, documents)))
        head = ("task: tiny", "dataset_path: json", f"dataset_kwargs: {{data_files: {tmp_path}/documents.json}}")
        text = (*head, "test_split: train", "num_fewshot: 0", *fields)
        (tmp_path / "tiny.yaml").write_text("\n".join(text) + "\n")
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return simple_evaluate(lm, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0)

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

        def encode(self, text):
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


def test_folder_of_transformers(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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


def test_what_a_model_does_not_say():
    with pytest.raises(ValueError, match="mask_index: expected one, for the model comes with none"):
        FastdiffLM(thin(), Bytes())
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        FastdiffLM(thin(), mask_index=M)
    with pytest.raises(ValueError, match="max_length: expected one"):
        FastdiffLM(thin().forward, Bytes(), mask_index=M)
