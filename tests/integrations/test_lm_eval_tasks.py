"""lm-evaluation-harness: whole tasks of a few documents, offline."""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval, in the extra lm-eval, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from harness import WORDS, L, M, direct, harness, thin, tokens, words
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from fastdiff import cli, exact_nll, sample
from fastdiff.data import encode
from fastdiff.integrations.lm_eval import Bytes, FastdiffLM

CHOICES = ("output_type: multiple_choice", 'doc_to_text: "{{question}}"', 'doc_to_choice: "{{choices}}"')
CHOICES += ("doc_to_target: gold", "metric_list: [{metric: acc}, {metric: acc_norm}]")


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
