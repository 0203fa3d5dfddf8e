"""`fastdiff tokenize`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import Trust, show
from fastdiff.data.documents import FORMATS
from fastdiff.data.shards import TokenFolder
from fastdiff.data.tokenizing import tokenize as run_tokenizing


def tokenize(
    out: Annotated[Path, typer.Option(help="folder of tokens to write")],
    data: Annotated[list[str] | None, typer.Option(help="a file or a folder; may be given several times")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="bytes, a tokenizer.json, or a folder or name as transformers takes it")
    ] = "bytes",
    format: Annotated[
        str, typer.Option(help=f"{', '.join(FORMATS)}; text: a file is a document, lines: a line is")
    ] = FORMATS[0],
    field: Annotated[str, typer.Option(help="of JSONL and Parquet, what holds the text")] = "text",
    eos: Annotated[
        str | None, typer.Option(help="token behind each document", show_default="the tokenizer's own, if any")
    ] = None,
    held_out: Annotated[float, typer.Option(help="share of the documents kept for validation")] = 0.01,
    shard_bytes: Annotated[int, typer.Option(help="bytes of files for a shard; compressed ones are not cut")] = 2**26,
    workers: Annotated[int | None, typer.Option(help="processes", show_default="one for each CPU")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="only read all of --out again, and compare its hashes")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Tokens of files for `fastdiff train --data OUT`, in parallel. Killed, and started again, it goes on."""
    if check:
        found = TokenFolder(out)
        found.check()
    elif not data:
        raise ValueError("data: expected files or folders, got none")
    else:
        found = run_tokenizing(
            data,
            out,
            tokenizer,
            format=format,
            field=field,
            eos=eos,
            held_out=held_out,
            shard_bytes=shard_bytes,
            workers=_cpus() if workers is None else workers,
            trust_remote_code=trust_remote_code,
        )
    rows = {"vocabulary": f"{found.num_tokens:,} ({found.settings['tokenizer']['name']})"}
    for part, stream in (("to train on", found.train), ("held out", found.held_out)):
        rows[part] = f"{stream.size:,} tokens of {stream.num_documents:,} documents"
    rows["shards"] = f"{len(found.shards):,}" + ", as they were written" * check
    show(f"tokens in {out}", rows)


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
