"""Prompts and answers: what is scored of them, which is the likeliest and how sure that is, and what is refused."""

import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torchrun
from networks import nll_by_chain_rule
from oracles import mixture
from test_likelihood import tokenizer_folder
from typer.testing import CliRunner

from fastdiff import cli
from fastdiff.answers import RANKINGS, accuracy, ranking, read_questions, records
from fastdiff.data import NUM_BYTES, encode
from fastdiff.data.texts import Bytes
from fastdiff.likelihood import likelihoods
from fastdiff.loading import Loaded, load
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.graphs import Absorbing
from fastdiff.training import SCHEDULE

CPU = torch.device("cpu")
LENGTH, GIVEN = 14, 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


class Letters:
    """The first letters as ids."""

    eos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return ["abcd".index(letter) for letter in text]


def of(model, tokenizer, mask_index, length=LENGTH, front=()):
    graph = Absorbing(mask_index + 1)
    return Loaded(
        torch.nn.Identity(), model, None, graph, SCHEDULE, "logits", True, tokenizer, length, list(front), CPU
    )


def thin(num_states=NUM_BYTES + 1, length=24):
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(num_states, length, 16, 1, 2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write(file, *lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


QUESTIONS = [
    dict(prompt="The sky is ", answers=["red", "blue", "so"], right=1),
    dict(prompt="Grass:", answers=[" green", " of a longer kind", " no"], right=2),
    dict(prompt="", answer="unprompted"),
    dict(prompt="näh", answers=["öö", "oo"]),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command on the folder of a run and a file of questions, in the current folder."""
    monkeypatch.chdir(tmp_path)
    thin().save_pretrained(tmp_path / "run")
    write(tmp_path / "pairs.jsonl", *QUESTIONS)
    return "answers run --data pairs.jsonl --num-samples 31 --json out.json"


def invoke(command, *more):
    result = CliRunner().invoke(cli.app, [*command.split(), *more], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def numbers():
    with open("out.json") as file:
        return json.load(file)


# ---------------------------------------------------------------------------------------------------------
# Likelihoods.


def test_likelihoods_are_the_mean_over_all_orders(run):
    """A token after another, in each order, given the prompt."""
    shown = invoke(run)
    model, found = thin().double(), numbers()["records"]
    model.mask_index = NUM_BYTES
    assert [record["line"] for record in found] == [1, 2, 3, 4]
    for record, question in zip(found, QUESTIONS, strict=True):
        assert record["right"] == question.get("right", 0 if "answer" in question else None)
        texts = question.get("answers") or [question["answer"]]
        assert [answer["answer"] for answer in record["answers"]] == texts
        for text, answer in zip(texts, record["answers"], strict=True):
            prompt = question["prompt"].rstrip()
            context, target = encode(prompt), encode((question["prompt"] + text)[len(prompt) :])
            assert answer["tokens"] == len(target)
            assert answer["bytes"] == len(text.lstrip().encode())
            low, high = answer["nll_interval"]
            if len(target) > 5:
                assert answer["network_passes"] <= 31
                assert low < answer["nll"] < high
            else:
                nll = [chain(model, context, target, order) for order in permutations(range(len(target)))]
                assert answer["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
                assert low == high == answer["nll"]
            for unit in ("token", "byte"):
                assert answer[f"nll_per_{unit}"] == answer["nll"] / answer[f"{unit}s"]
                assert answer[f"nll_per_{unit}_interval"] == [low / answer[f"{unit}s"], high / answer[f"{unit}s"]]
        for by, name in zip(RANKINGS, ("nll", "nll_per_byte"), strict=True):
            nll = [answer[name] for answer in record["answers"]]
            assert (by in record) == (len(nll) > 1)
            if by in record:
                assert record[by]["order"] == sorted(range(len(nll)), key=nll.__getitem__)
    assert all(text in shown for text in ("accuracy", "wrongly first, expected", "3 right answers"))
    whole, right = numbers(), [found[0]["answers"][1], found[1]["answers"][2], found[2]["answers"][0]]
    for name in ("nll", "bytes", "tokens"):
        assert whole["right"][name] == pytest.approx(sum(answer[name] for answer in right))
    assert whole["right"]["words"] == 3
    assert [whole["accuracy"][by]["questions"] for by in RANKINGS] == [2, 2]
    assert whole["accuracy"]["by_nll"]["accuracy"] == sum(r["by_nll"]["order"][0] == r["right"] for r in found[:2]) / 2


def chain(model, context, target, order):
    """-log p(target | context) in one order of the target's tokens."""

    def given(xt):
        return model(torch.cat([context.unsqueeze(0), xt], 1))[:, len(context) :]

    given.mask_index = NUM_BYTES
    with torch.no_grad():
        return nll_by_chain_rule(given, target.unsqueeze(0), order)


def test_spaces_between_prompt_and_answer(tmp_path):
    """They are scored wherever they stand, and no length counts them before an answer."""
    file = write(tmp_path / "f", dict(prompt="Q: ", answer="yes"), dict(prompt="Q:", answer=" yes"))
    spaced, moved = (question.pieces[0] for question in read_questions(file, of(None, Bytes(), 256)))
    for piece in (spaced, moved):
        assert (bytes(piece.context.tolist()), bytes(piece.target.tolist()), piece.bytes) == (b"Q:", b" yes", 3)
    (question,) = read_questions(write(tmp_path / "f", dict(prompt="Q", answer="\n")), of(None, Bytes(), 256))
    assert question.pieces[0].bytes == 1


# ---------------------------------------------------------------------------------------------------------
# Rankings.


def test_probabilities_against_formulas():
    """Two normal errors; one of Student's t with one degree of freedom, Cauchy's; three alike; exact ones."""
    inf = math.inf

    def likeliest(nll, stderr, freedom):
        return ranking(*(np.array(column, dtype=float) for column in (nll, stderr, freedom)))

    found = likeliest([4.0, 3.0], [0.6, 0.8], [inf, inf])
    assert found["order"] == [1, 0]
    assert found["error"] == pytest.approx(math.erfc(1 / math.sqrt(2)) / 2, abs=0.01)
    found = likeliest([4.0, 3.0], [0.0, 2.0], [inf, 1])
    assert found["probabilities"] == pytest.approx(
        [0.5 - math.atan(0.5) / math.pi, 0.5 + math.atan(0.5) / math.pi], abs=0.015
    )
    assert likeliest([5.0] * 3, [0.3] * 3, [9] * 3)["probabilities"] == pytest.approx([1 / 3] * 3, abs=0.015)
    assert likeliest([2.0, 1.0, 1.0], [0.0] * 3, [inf] * 3)["probabilities"] == [0, 0.5, 0.5]
    assert likeliest([inf, 1.0], [math.nan, 0.3], [7, 7]) == dict(order=[1, 0], probabilities=[0, 1], error=0)


@pytest.mark.slow
@pytest.mark.parametrize(("answers", "num_samples"), [(2, 24), (4, 64)])
def test_a_wrong_ranking_is_as_probable_as_it_says(tmp_path, answers, num_samples):
    """Questions whose answers lie close to one another, against the truth of an oracle, for many seeds."""
    oracle = mixture(LENGTH, 4, components=4, seed=1)
    x = oracle.sample(3000, LENGTH, seed=3)
    x[:, :GIVEN] = x[0, :GIVEN]
    x = torch.unique(x, dim=0)
    nll = oracle.nll(x, (torch.arange(LENGTH) >= GIVEN).expand_as(x))
    g, lines, truth = torch.Generator().manual_seed(0), [], []
    while len(lines) < 80:
        near = (nll - nll[torch.randint(len(x), (), generator=g)]).abs() < 1.5
        which = near.nonzero().squeeze(1)
        if len(which) >= answers:
            which = which[torch.randperm(len(which), generator=g)[:answers]]
            texts = ["".join("abcd"[i] for i in row) for row in x[which]]
            lines.append(dict(prompt=texts[0][:GIVEN], answers=[text[GIVEN:] for text in texts], right=0))
            truth.append(nll[which])
    model = of(oracle, Letters(), oracle.mask_index)
    questions = read_questions(write(tmp_path / "pairs.jsonl", *lines), model)
    pieces = [piece for question in questions for piece in question.pieces]
    best = [int(of_line.argmin()) for of_line in truth]
    claimed, wrong, inside = [], [], []
    for seed in range(5):
        found = records(questions, likelihoods(model, pieces, {}, None, num_samples=num_samples, seed=seed))
        claimed += [record["by_nll"]["error"] for record in found]
        wrong += [record["by_nll"]["order"][0] != k for record, k in zip(found, best, strict=True)]
        low, high = accuracy(found, "by_nll")["masking_interval"]
        inside.append(low <= sum(k == 0 for k in best) / len(best) <= high)
    claimed, wrong = torch.tensor(claimed), torch.tensor(wrong).double()
    assert wrong.sum() > 30
    assert sum(inside) >= 4
    for low, high in ((0, 0.03), (0.03, 0.15), (0.15, 0.35), (0.35, 1), (0, 1)):
        among = (claimed >= low) & (claimed <= high)
        by_question = torch.where(among, wrong - claimed, 0).view(5, -1).sum(0)  # repeats of one err alike
        error = torch.linalg.vector_norm(by_question) / among.sum()
        # few chains know their own spread badly, and err towards a spread that is too large
        assert -0.12 < wrong[among].mean() - claimed[among].mean() < 3 * error + 0.01


def test_accuracy_and_its_intervals():
    def record(order, right, probability):
        return dict(by_nll=dict(order=order, probabilities=[probability, 1 - probability]), right=right)

    sure = [record([0, 1], 0, 1.0)] * 8 + [record([1, 0], 0, 0.0)] * 2
    found = accuracy([*sure, dict(right=0), record([0, 1], None, 0.5)], "by_nll")
    assert (found["accuracy"], found["questions"], found["masking_interval"]) == (0.8, 10, [0.8, 0.8])
    for bound in found["questions_interval"]:  # Wilson's: where the share lies 1.96 standard errors of the bound away
        assert abs(0.8 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 10))
    low, high = accuracy([record([0, 1], 0, 0.9)] * 100, "by_nll")["masking_interval"]
    assert (low, high) == pytest.approx((0.9 - 1.96 * 0.03, 0.9 + 1.96 * 0.03))
    assert accuracy(sure[:1], "by_nll")["questions_interval"] == [pytest.approx(1 / (1 + 1.96**2)), 1]


# ---------------------------------------------------------------------------------------------------------
# Long evaluations.


def test_a_killed_evaluation_goes_on_to_the_same_numbers(run, monkeypatch, tmp_path):
    calls, estimate = [], Loaded.estimate

    def counted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > last:
            raise KeyboardInterrupt
        return estimate(self, *arguments, **options)

    monkeypatch.setattr(Loaded, "estimate", counted)
    last = 999
    invoke(run)
    whole, n = numbers(), len(calls)
    (tmp_path / "out.json").unlink()
    calls.clear()
    last = 3
    CliRunner().invoke(cli.app, run.split())
    assert not (tmp_path / "out.json").exists()
    calls.clear()
    last = 999
    invoke(run)
    assert numbers() == whole
    assert len(calls) == n - 3
    assert not (tmp_path / "out.json.0").exists()


@pytest.mark.slow
def test_the_same_bits_on_any_number_of_ranks(run, tmp_path):
    (tmp_path / "command.txt").write_text(run)
    found = []
    for ranks in (1, 2):
        torchrun.launch(__file__, ranks, "evaluated")
        found.append(numbers())
    assert found[0] == found[1]


def evaluated():
    """On one rank of several."""
    with open("command.txt") as file:
        cli.app(file.read().split(), standalone_mode=False)


def test_tolerance_and_a_short_table(run, tmp_path):
    write(tmp_path / "pairs.jsonl", *QUESTIONS * 4)
    shown = invoke(f"{run} --tolerance 0.05 --seed 3")
    assert "and 6 more prompts" in shown
    found = numbers()["records"]
    assert len(found) == 16
    assert max(answer["network_passes"] for record in found for answer in record["answers"]) > 31
    assert shown.count("unprompted") == 2


# ---------------------------------------------------------------------------------------------------------
# Chats.


@pytest.fixture
def chatty(tmp_path, monkeypatch):
    """A masked model of transformers whose tokenizer puts a BOS in front, as its chat template does."""
    from tokenizers import processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    backend = tokenizer_folder(tmp_path / "bert", mask="<mask>").backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 0)])
    names = dict(bos_token="<end>", eos_token="<end>", mask_token="<mask>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)
    tokenizer.save_pretrained(tmp_path / "bert")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
    model.save_pretrained(tmp_path / "bert")
    return load("hf:bert", CPU)


def test_chats(chatty, tmp_path):
    """The template writes prompts, its BOS stands once, and what the assistant says is scored, without an end."""
    talk = [dict(role="user", content="a"), dict(role="assistant", content="b"), dict(role="user", content="c")]
    file = write(tmp_path / "pairs.jsonl", dict(prompt="a", answers=["yes", " no"]), dict(prompt=talk, answer="d"))
    assert (chatty.front, chatty.length) == ([0], 63)
    model, of_text = chatty.in_chats(), chatty.tokenizer.decode
    assert (model.front, model.length) == ([], 64)
    first, second = read_questions(file, model, chat=True)
    for piece, answer in zip([*first.pieces, *second.pieces], ["yes", " no", "d"], strict=True):
        assert of_text(piece.target) == answer
    assert of_text(first.pieces[0].context) == "<end>user: a\nassistant:\n"
    assert of_text(second.pieces[0].context) == "<end>user: a\nassistant: b\nuser: c\nassistant:\n"
    (plain,) = read_questions(write(file, dict(prompt="<end>user: a\nassistant:\n", answer="yes")), model)
    assert of_text(plain.pieces[0].target) == "\nyes"
    write(file, dict(prompt="a", answers=["yes", " no"]))
    invoke("answers hf:bert --chat --data pairs.jsonl --num-samples 15 --json out.json")
    pieces = [piece for piece in first.pieces if len(piece.target) <= 3]  # enumerated
    assert pieces
    expected = [model.estimate(p.context[None], p.target[None], torch.tensor([0]), num_samples=15) for p in pieces]
    found = [answer["nll"] for answer in numbers()["records"][0]["answers"] if answer["tokens"] <= 3]
    assert found == pytest.approx([e.nll.item() for e in expected], rel=1e-5)
    shown = invoke("sample hf:bert --chat --length 40 --prompt", "hello there")
    assert "user: hello there\nassistant:\n" in shown


def test_chats_that_are_refused(chatty, tmp_path):
    file, model = tmp_path / "pairs.jsonl", chatty.in_chats()

    def fail(match, prompt, chat=True, model=model):
        write(file, dict(prompt=prompt, answer="a"))
        with pytest.raises(ValueError, match=f"line 1: {match}"):
            read_questions(file, model, chat=chat)

    fail("chat: the tokenizer's template refuses these messages: no system", [dict(role="system", content="a")])
    fail(
        "prompt: expected a text, got messages, which the chat template is for: add --chat",
        [dict(role="user", content="a")],
        False,
    )
    fail("prompt: expected a text, or messages with role and content, got", [dict(content="a")])
    fail("prompt: expected a text, or messages with role and content, got", [])
    fail("chat: expected a tokenizer with a chat template, got one without", "a", model=of(None, Bytes(), 256))
    fail("expected no mask among the tokens", "<mask>")


# ---------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"expected JSON, got b'\{"),
        (b"\xff\xfe\xff", "expected JSON, got"),
        ("[1]", 'expected {"prompt": ..., "answers": [...]} or one "answer", got'),
        (dict(prompt="a"), 'expected {"prompt": ..., "answers"'),
        (dict(answer="a"), 'expected {"prompt": ..., "answers"'),
        (dict(prompt="a", answer="b", answers=["c"]), 'expected {"prompt": ..., "answers"'),
        (dict(prompt=3, answer="b"), "prompt: expected a text, or messages with role and content, got 3"),
        (dict(prompt="a", answers=[]), "answers: expected texts, at least one, got []"),
        (dict(prompt="a", answers="b"), "answers: expected texts, at least one, got 'b'"),
        (dict(prompt="a", answer=None), "answers: expected texts, at least one, got [None]"),
        (dict(prompt="a", answers=["b", "", "c"]), "answers: expected at least a token in each, got ''"),
        (dict(prompt="a ", answers=["b", ""]), "answers: expected at least a token in each, got ''"),
        (dict(prompt="a", answers=["b", "c", "b"]), "answers: expected different ones, got 'b' twice"),
        (
            dict(prompt="a" * 20, answer="b" * 5),
            "expected at most 24 tokens with the prompt, got 20 of the prompt and 5 of",
        ),
        (dict(prompt="a", answers=["b", "c"], right=2), "right: expected an index, 0 to 1, got 2"),
        (dict(prompt="a", answers=["b", "c"], right=-1), "right: expected an index, 0 to 1, got -1"),
        (dict(prompt="a", answers=["b", "c"], right="b"), "right: expected an index, 0 to 1, got 'b'"),
        (dict(prompt="a", answers=["b", "c"], right=True), "right: expected an index, 0 to 1, got True"),
        (r'{"prompt": "a", "answer": "\ud800"}', "surrogates not allowed"),
    ],
)
def test_lines_that_are_refused(run, tmp_path, line, message):
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "pairs.jsonl").write_bytes(json.dumps(QUESTIONS[0]).encode() + b"\n \n" + line + b"\n")
    error = CliRunner().invoke(cli.app, run.split()).exception
    assert isinstance(error, ValueError)
    assert str(error).startswith("pairs.jsonl, line 3: ")
    assert message.replace("\\", "") in str(error)
    assert not (tmp_path / "out.json").exists()


def test_help_shows_the_form_of_a_line():
    assert '"answers": [text, ...]}' in invoke("answers --help")


def test_what_is_refused(run, tmp_path):
    def error(command):
        return str(CliRunner().invoke(cli.app, command.split()).exception)

    assert "tolerance: expected a positive number of nats, got -1" in error(f"{run} --tolerance -1")
    assert "num_samples: expected at least 3" in error(f"{run} --num-samples 2")
    assert "seed: expected a number of 64 bits" in error(f"{run} --seed {2**64}")
    assert "json: expected a file, but run is a folder" in error(run.replace("out.json", "run"))
    assert "json: expected another file than the data's" in error(run.replace("out.json", "pairs.jsonl"))
    assert "No such file or directory: 'none'" in error(run.replace("pairs.jsonl", "none"))
    assert "chat: expected a tokenizer with a chat template" in error(f"{run} --chat")
    assert "chat: expected a tokenizer with a chat template" in error("sample run --chat --prompt a")
    (tmp_path / "pairs.jsonl").write_text("\n")
    assert "data: expected a line of JSON for each prompt, found none in pairs.jsonl" in error(run)
    thin(NUM_BYTES).save_pretrained(tmp_path / "run")
    assert "run: expected a model with a mask" in error(run)


if __name__ == "__main__":
    torchrun.run(globals())
