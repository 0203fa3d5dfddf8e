"""Makes the tables and pictures of the documentation from the files of benchmarks/results.

    python benchmarks/report.py

What stands on a page between `<!-- results: NAME: OPERATION -->` and `<!-- end -->` is made from NAME.json.
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
from results import ROOT, Case, load, sources

plt.switch_backend("Agg")  # files, no windows

DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks/results"
BLOCK = re.compile(r"(?<=<!-- results: )(\S+): (\S+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
SWEEP = re.compile(r"sweep: (.+), V = (\d+), (\d+)% masked")
COMMON_V, COMMON_SHARE = 50257, 50


def page(text: str) -> str:
    """A page with its blocks made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}: {block[2]} -->\n{section(block[1], block[2])}", text)


def section(name: str, operation: str) -> str:
    cases = load(RESULTS / f"{name}.json")
    return table(operation, {case: c for case, c in cases.items() if case.startswith(f"{operation}: ")})


def table(operation: str, cases: dict[str, Case]) -> str:
    """A row for each call of ours; with the first of a case, what the others take."""
    setting = sorted({f"{c.machine}; {_listed(c.versions)}; {_kernels(c.sources)}" for c in cases.values()})
    lines = [f"`pytest benchmarks/bench_{operation}.py --benchmark-only --json-results FILE`", ""]
    lines += [*setting, ""]
    lines += ["| case | ours | ms (quartiles) | of the floor | MB | others |", "| --- | --- | --- | --- | --- | --- |"]
    for name, c in cases.items():
        others = ", ".join(against(c, who) for who in c.calls if who not in ours(c))
        for who in ours(c):
            call = c.calls[who]
            share = f"{c.floor / call.seconds:.0%}" if c.floor else ""
            label = name.split(": ", 1)[1] if call is c.first else ""
            what = who.removeprefix("fastdiff").removeprefix(", ")
            spread = f"{_ms(call.seconds)} ({_ms(call.low)} to {_ms(call.high)})"
            lines.append(f"| {label} | {what} | {spread} | {share} | {_mb(call.extra_bytes)} | {others} |")
            others = ""
    return "\n".join(lines) + "\n"


def ours(c: Case) -> list[str]:
    return [who for who in c.calls if who.startswith("fastdiff")]


def against(c: Case, who: str) -> str:
    call = c.calls[who]
    ratio = call.seconds / c.first.seconds
    return f"{who} {ratio:.{0 if ratio >= 10 else 1}f}x {_mb(call.extra_bytes)} MB"


def draw_shares(cases: dict[str, Case], path: Path) -> None:
    """A dot for each kernel and case: the share of what the machine's own rates allow."""
    shown = {name: c for name, c in cases.items() if c.floor and not re.search(r"warm|in cache|integrations", name)}
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.22 * len(shown)), layout="constrained")
    kernels = [
        who for c in shown.values() for who in ours(c) if who in ("fastdiff", "fastdiff, triton", "fastdiff, cuda")
    ]
    for kernel in dict.fromkeys(kernels):
        with_it = {name: c for name, c in shown.items() if kernel in c.calls}
        shares = [100 * c.floor / c.calls[kernel].seconds for c in with_it.values()]
        axes.scatter(shares, list(with_it), label=kernel, zorder=3)
    axes.set(xlabel="% of the floor", xlim=(0, None))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    if len(axes.collections) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def draw_sweep(cases: dict[str, Case], path: Path) -> None:
    """Time above, memory below; against the share of masked tokens and the vocabulary."""
    points = {tuple(match.groups()): c for name, c in cases.items() if (match := SWEEP.fullmatch(name))}
    points = {(what, int(v), int(share)): c for (what, v, share), c in points.items()}
    columns = [
        (what, axis, {key[axis]: c for key, c in sorted(points.items()) if key[0] == what and key[3 - axis] == fixed})
        for what in dict.fromkeys(what for what, _, _ in points)
        for axis, fixed in ((2, COMMON_V), (1, COMMON_SHARE))
    ]
    figure, panels = plt.subplots(2, len(columns), figsize=(3.4 * len(columns), 5.5), layout="constrained")
    for (time, memory), (what, axis, line) in zip(panels.T, columns, strict=True):
        for who in next(iter(line.values())).calls:
            calls = [c.calls[who] for c in line.values()]
            time.plot(list(line), [call.seconds * 1e3 for call in calls], marker="o", ms=4, label=who)
            memory.plot(list(line), [call.extra_bytes / 1e6 for call in calls], marker="o", ms=4)
        name = {1: "vocabulary", 2: "% of tokens masked"}[axis]
        time.set(title=what, ylabel="ms", ylim=(0, None), xlim=(0, None))
        memory.set(xlabel=name, ylabel="MB beyond gradients", ylim=(0, None), xlim=(0, None))
        for panel in (time, memory):
            panel.locator_params(axis="x", nbins=5)
        time.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    pages = {file: file.read_text() for file in DOCS.rglob("*.md")}
    for name in {block[1] for text in pages.values() for block in BLOCK.finditer(text)}:
        cases = load(RESULTS / f"{name}.json")
        draw_shares(cases, DOCS / f"{name}_shares.png")
        draw_sweep(cases, DOCS / f"{name}_sweep.png")
    for file, text in pages.items():
        file.write_text(page(text))


def _kernels(measured: str) -> str:
    return f"kernels {measured}" + (
        "" if measured in (sources("cpu"), sources("cuda")) else ", which have changed since"
    )


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _mb(size: int) -> str:
    return f"{max(size, 0) / 1e6:.0f}"


if __name__ == "__main__":
    main()
