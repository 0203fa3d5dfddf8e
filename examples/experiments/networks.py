"""One backbone for every method, trained on the same letters for the same number of steps; a run that stops goes on."""

import io
import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from fastdiff.files import read_config, write_atomically
from fastdiff.loading import Loaded, load
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training.objectives import SCHEDULE, SCORES

from .methods import ABSORBING, BLOCK, MASK, METHODS, UNIFORM, Method, N
from .report import Setup, console
from .texts import Letters, LetterText, english, windows

LENGTH, BATCH, PEAK, WARMUP = 128, 32, 2e-3, 50
POINTS, WINDOWS, PASSES = 10, 32, 8  # of a curve

Curve = dict[str, list[float]]  # letters seen, bits per held-out letter, CPU seconds


def letter_text(setup: Setup) -> LetterText:
    return LetterText(english(setup.text, setup.out), LENGTH)


def subject(setup: Setup) -> Loaded:
    """The model that is looked into: the one that --model names, or the time-free one of the letters (RADD)."""
    if setup.model:
        return load(setup.model, torch.device("cpu"))
    return of_letters("radd", setup, letter_text(setup))


def of_letters(name: str, setup: Setup, text: LetterText) -> Loaded:
    """The network of RADD, MDLM, SEDD (its scores alone) or block diffusion, with all that samples need."""
    network, _ = trained(name, setup, text)
    graph = ABSORBING if METHODS[name].masked else UNIFORM
    block_length = BLOCK if name == "block" else None
    score, conditionals, parametrization = network, None, SCORES[graph.name]
    if not METHODS[name].timed:
        score, parametrization = None, "logits"
        conditionals = network.body, network.lm_head
        if block_length:
            conditionals = network.block_conditionals(block_length, MASK, SCHEDULE.total_noise)
    names = dict(graph=graph, schedule=SCHEDULE, parametrization=parametrization, exclude_mask=True)
    names |= dict(tokenizer=Letters(), length=LENGTH, front=[], device=torch.device("cpu"), block_length=block_length)
    return Loaded(network, conditionals, score, **names)


def unseen(setup: Setup, model: Loaded, n: int) -> Tensor:
    """At most n windows of text that our networks have not been trained on, for `subject`: [<= n, L]."""
    if setup.model is None:
        return letter_text(setup).validation(n)
    return windows(english(setup.text, setup.out), model.tokenizer, model.length, n)


def trained(name: str, setup: Setup, text: LetterText) -> tuple[DiffusionTransformer, Curve]:
    """A method's network and its curve, from its folder if it is there already."""
    folder = setup.out / "networks" / name
    settings = {"steps": setup.steps, "batch": BATCH, "lr": PEAK, "text": text.fingerprint}
    if (folder / "config.json").exists() and read_config(folder).get("training") == settings:
        return DiffusionTransformer.from_pretrained(folder).eval(), json.loads((folder / "curve.json").read_text())
    method = METHODS[name]
    torch.manual_seed(0)
    model = backbone(method, setup.quick)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    curve: Curve = {"letters": [], "bits": [], "cpu_seconds": []}
    state: dict[str, Any] = {"step": 0, "cpu_seconds": 0.0, "curve": curve, "settings": settings}
    if (folder / "state.pt").exists():
        kept = torch.load(folder / "state.pt")
        if kept["settings"] == settings:
            model.load_state_dict(kept.pop("model"))
            optimizer.load_state_dict(kept.pop("optimizer"))
            state = kept
    every = max(setup.steps // POINTS, 1)
    for step in range(state["step"], setup.steps):
        started = time.process_time()
        train_step(method, model, optimizer, text, step, setup.steps)
        state["cpu_seconds"] += time.process_time() - started
        if (step + 1) % every:
            continue
        state["step"] = step + 1
        add_point(state["curve"], method, model, text, state)
        bits = state["curve"]["bits"][-1]
        console.print(f"{method.title}, step {step + 1} of {setup.steps}: {bits:.2f} bits per character")
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, content)
        write_atomically(folder / "state.pt", content.getvalue())
    write_atomically(folder / "curve.json", json.dumps(state["curve"]).encode())
    model.save_pretrained(folder, training=settings)
    (folder / "state.pt").unlink()
    return model.eval(), state["curve"]


def backbone(method: Method, quick: bool) -> DiffusionTransformer:
    shape = dict(dim=32, depth=1) if quick else dict(dim=192, depth=4)
    return DiffusionTransformer(ModelConfig(N + method.masked, LENGTH, heads=4, cond_dim=64 * method.timed, **shape))


def train_step(
    method: Method,
    model: DiffusionTransformer,
    optimizer: torch.optim.Optimizer,
    text: LetterText,
    step: int,
    steps: int,
) -> None:
    """One batch, under a learning rate that rises and then falls as a cosine to a tenth."""
    rate = PEAK * min((step + 1) / WARMUP, 1.0) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    x0 = text.sequences(step * BATCH, (step + 1) * BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(model, x0, step)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def add_point(curve: Curve, method: Method, model: DiffusionTransformer, text: LetterText, state: dict) -> None:
    model.eval()
    nll = method.nll(model, text.validation(WINDOWS), PASSES).mean().item()
    model.train()
    curve["letters"].append(state["step"] * BATCH * LENGTH)
    curve["bits"].append(nll / LENGTH / math.log(2))
    curve["cpu_seconds"].append(state["cpu_seconds"])
