"""For mkdocs: links from a page to files that are not pages, such as sources, become their text."""

import re


def on_page_markdown(markdown, **_):
    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)", lambda m: m[0] if m[2].endswith(".md") else m[1], markdown)
