"""Which responses a masked model takes for its own text, by their likelihood given the prompt.

Beside ours stands the rule of the authors' code, with its sums and its means (published_rule.py). Their experiment on
text8 also sets its lower-case words against sentences with capitals and commas, behind prompts that these do not
continue. Here all texts are of the same 27 letters, and what a response from another place gives is a row of its own.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff import one_pass_nll
from fastdiff.data.texts import Piece
from fastdiff.likelihood import likelihoods
from fastdiff.loading import Loaded

from .areas import Area, area_under_curve, findings, settled
from .autoregressive import continued
from .networks import LENGTH, letter_text, subject, trained
from .published_rule import MEANS, SUMS, known_strings, published
from .report import Setup, Table, reporting
from .texts import ALPHABET, Letters, LetterText, other_english, windows

MINUTES = 8
TRUE, ELSEWHERE, OTHER = "true", "from another place", "of another text"
TEMPERATURES = (1.0, 0.7)
OURS, ALL_MASKED = "ours", "all masked, one pass"
RULES = (OURS, SUMS, MEANS)

Scores = dict[str, dict[int, Tensor]]  # by rule and number of passes: nats per letter of each response, [n]
Areas = dict[str, dict[int, Area]]


def run(setup: Setup) -> None:
    """Responses of other texts and of a generator told from the true ones, by likelihood given the prompt."""
    n, passes = (4, 16) if setup.quick else (80, 64)
    model, text = subject(setup), letter_text(setup)
    if (kind := model.name_of("time-free")) != "time-free":
        raise SystemExit(
            f"model: expected one with a time-free likelihood, got {setup.model}, which has that of a {kind}"
        )
    with reporting("auditing", setup) as report:
        texts = continuations(setup, text, n, min(LENGTH, model.length))
        scores = {name: response_scores(model, x, passes) for name, x in texts.items()}
        whole = {name: whole_nll(model, x, passes // 4) for name, x in texts.items()}
        areas = {name: areas_by_passes(scores[name], scores[TRUE]) for name in scores if name != TRUE}
        of_whole = {name: area_under_curve(whole[name], whole[TRUE]) for name in areas}
        toy = known_strings(passes)
        report.numbers = {"areas": areas, "areas_of_whole": of_whole, "known_strings": toy, "windows": n}
        report.numbers["nll_per_letter"] = {name: score[OURS][passes].tolist() for name, score in scores.items()}
        report.tables = [separation_table(scores, areas, of_whole, passes), passes_table(areas), toy_table(toy, passes)]
        report.figure = picture(scores, areas, passes)


def continuations(setup: Setup, text: LetterText, n: int, length: int) -> dict[str, Tensor]:
    """Windows of letters, half prompt and half response, by what the response is: [n, length] each."""
    true = text.validation(n)[:, :length]
    prompt, response = true.tensor_split([length // 2], 1)
    other = windows(other_english(), Letters(), length, len(true))
    found = {TRUE: true, ELSEWHERE: torch.cat([prompt, response.roll(len(true) // 2, 0)], 1), OTHER: other}
    network, _ = trained("ar", setup, text)
    for temperature in TEMPERATURES:
        found[f"generated, temperature {temperature:g}"] = continued(network, prompt, length, temperature=temperature)
    return found


def response_scores(model: Loaded, x: Tensor, passes: int) -> Scores:
    """By every rule, after every number of passes."""
    numbers = [2**k for k in range(passes.bit_length())]
    pieces = [piece(model, letters, len(letters) // 2) for letters in x]
    scored = x.shape[1] - x.shape[1] // 2
    found: Scores = {ALL_MASKED: {}, SUMS: {}, MEANS: {}, OURS: {}}
    with torch.autocast("cpu", torch.bfloat16):
        drawn = [drawn_scores(model, each, passes, seed) for seed, each in enumerate(pieces)]
        for number in numbers:
            if number >= 4:  # of 3 there is an error
                found[OURS][number] = likelihoods(model, pieces, {}, None, num_samples=number).nll / scored
    for rule in drawn[0]:
        of_passes = torch.cat([each[rule] for each in drawn]) / scored
        for number in numbers[: of_passes.shape[1].bit_length()]:
            found[rule][number] = of_passes[:, :number].mean(1)
    return found


def drawn_scores(model: Loaded, given: Piece, passes: int, seed: int) -> dict[str, Tensor]:
    """Nats of a response by each pass of the rules that are means over passes: [1, passes], or [1, 1]."""
    front = torch.tensor(model.front, dtype=torch.int64)
    x0 = torch.cat([front, given.context, given.target]).unsqueeze(0)
    target = (torch.arange(x0.shape[1]) >= x0.shape[1] - len(given.target)).unsqueeze(0)
    options = dict(mask_index=model.graph.mask_index, exclude_mask=model.exclude_mask)
    all_masked = one_pass_nll(model.conditionals, x0, target=target, **options).nll.unsqueeze(1)
    return {ALL_MASKED: all_masked} | published(model.conditionals, x0, target, passes=passes, seed=seed, **options)


def whole_nll(model: Loaded, x: Tensor, passes: int) -> Tensor:
    """Of prompt and response together, in nats per letter: [n]."""
    with torch.autocast("cpu", torch.bfloat16):
        pieces = [piece(model, letters, 0) for letters in x]
        return likelihoods(model, pieces, {}, None, num_samples=passes).nll / x.shape[1]


def piece(model: Loaded, letters: Tensor, given: int) -> Piece:
    """Letters in the model's own tokens, the first of them given."""
    text = Letters().decode(letters.tolist())
    context, target = (tokens(model, part) for part in letters.tensor_split([given]))
    return Piece(text, context, target, len(text) - given, len(text[given:].split()))


def tokens(model: Loaded, letters: Tensor) -> Tensor:
    if isinstance(model.tokenizer, Letters):
        return letters
    ids = model.tokenizer.encode(Letters().decode(letters.tolist()), add_special_tokens=False)
    return torch.tensor(ids, dtype=torch.int64)


def areas_by_passes(scores: Scores, true: Scores) -> Areas:
    return {
        rule: {passes: area_under_curve(nll, true[rule][passes]) for passes, nll in by_passes.items()}
        for rule, by_passes in scores.items()
    }


def separation_table(
    scores: dict[str, Scores], areas: dict[str, Areas], of_whole: dict[str, Area], passes: int
) -> Table:
    rows = []
    for name, by_rule in scores.items():
        nll = [f"{by_rule[rule][passes].mean():.3f}" for rule in RULES]
        found = [*(areas[name][rule][passes] for rule in RULES), of_whole[name]] if name != TRUE else []
        rows.append([name, *nll, *map(str, found)] + [""] * (4 - len(found)))
    columns = [f"{what}, {rule}" for what in ("nats per letter", "AUC") for rule in RULES]
    notes = [
        f"AUC: how often the response is less likely than a true one; {passes} passes, {passes // 4} for the whole. "
        "± is its standard error, of a bootstrap over windows.",
        *findings({name: by_rule[OURS][passes] for name, by_rule in areas.items()}),
        other_characters(len(scores[TRUE][OURS][passes])),
    ]
    return Table("Responses told from the true ones", ["response", *columns, "AUC of the whole, ours"], rows, notes)


def other_characters(n: int) -> str:
    """What counting characters alone would find, were the other text left as it is."""
    text = other_english()
    starts = torch.arange(n) * (len(text) - LENGTH) // n
    odd = torch.tensor([sum(c not in ALPHABET for c in text[i : i + LENGTH]) for i in starts.tolist()])
    area = area_under_curve(odd, torch.zeros_like(odd)).value
    return (
        f"Left with its capitals and points, the other text has {odd.sum() / (n * LENGTH):.0%} of characters that the "
        f"letters lack, and their number alone, without a network, has an AUC of {area:.2f}."
    )


def passes_table(areas: dict[str, Areas]) -> Table:
    numbers = sorted({passes for by_rule in areas.values() for by_passes in by_rule.values() for passes in by_passes})
    rows = []
    for name, by_rule in areas.items():
        for rule, found in by_rule.items():
            values = [f"{found[passes].value:.3f}" if passes in found else "" for passes in numbers]
            rows.append([name, rule, *values, settled(found, by_rule[OURS][numbers[-1]])])
    largest = max(area.error for by_rule in areas.values() for found in by_rule.values() for area in found.values())
    notes = [
        f"Standard errors are up to {largest:.3f}. Ours takes at least 3 passes, for its own error bar.",
        f"The last column: from how many passes on it is within a standard error of ours after {numbers[-1]}.",
    ]
    return Table("AUC against network passes", ["response", "rule", *map(str, numbers), "settled"], rows, notes)


def toy_table(found: dict[str, dict[str, float]], passes: int) -> Table:
    rows = [
        [rule, f"{mean['nll']:.3f}", f"{mean['excess']:+.3f} ± {mean['error']:.3f}"] for rule, mean in found.items()
    ]
    shares = [f"{found[rule]['nll'] / found['true']['nll']:.0%}" for rule in RULES]
    notes = [
        f"Mean of -log p over 128 strings of 8 letters with their true conditionals, {passes} passes each.",
        "Of the truth, ours gives {}, the published sums {} and means {}.".format(*shares),
    ]
    return Table("The rules where the likelihood is known", ["rule", "nats", "too much"], rows, notes)


def picture(scores: dict[str, Scores], areas: dict[str, Areas], passes: int) -> Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 4.5), layout="constrained")
    found = {name: by_rule[OURS][passes] for name, by_rule in scores.items()}
    colors = {name: f"C{i}" for i, name in enumerate(found)}
    histograms(left, {name: found[name] for name in (TRUE, ELSEWHERE, OTHER)}, colors)
    histograms(middle, {name: nll for name, nll in found.items() if name not in (ELSEWHERE, OTHER)}, colors)
    styles = dict(zip(RULES, ("-", "--", ":"), strict=True))
    for name, by_rule in areas.items():
        for rule, style in styles.items():
            x, y = zip(*((number, area.value) for number, area in by_rule[rule].items()), strict=True)
            right.plot(x, y, style, color=colors[name], marker=".", label=f"{name}, {rule}")
    right.axhline(0.5, color="0.7", zorder=0)
    right.set_xscale("log", base=2)
    right.set(xlabel="network passes", ylabel="AUC")
    right.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def histograms(axes: Axes, nll: dict[str, Tensor], colors: dict[str, str]) -> None:
    every = torch.cat(list(nll.values()))
    edges = torch.linspace(every.min().item(), every.max().item(), 25).tolist()
    for name, values in nll.items():
        axes.hist(values.tolist(), edges, color=colors[name], alpha=0.5, label=name)
    axes.set(xlabel="nats per letter of the response, given the prompt", ylabel="windows")
    axes.legend(fontsize="small")
