"""For mkdocs: links from a page to files that are not pages, such as sources, become their text; and the command's
options, in the place of a comment."""

import re

import typer
from typer.cli import get_docs_for_click

from fastdiff.cli import app

COMMAND = "<!-- the command -->"


def on_page_markdown(markdown, **_):
    if COMMAND in markdown:
        markdown = markdown.replace(COMMAND, command())
    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)", lambda m: m[0] if m[2].endswith(".md") else m[1], markdown)


def command():
    """Every command and its options."""
    told = typer.main.get_command(app)
    whole = get_docs_for_click(obj=told, ctx=typer.Context(told), name="fastdiff")
    _, *commands = re.split(r"^(?=## )", whole, flags=re.MULTILINE)  # what is first lists them
    return "".join(commands)
