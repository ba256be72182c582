"""Links between the pages of the site and the files of the repository.

A link may lead to any file of the repository, as it must for who reads the page there. If the file
is a page of the site, it leads to that page in the site; if not, its path is shown.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Pages that live elsewhere than in docs/.
TAKEN_IN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/README.md": "results.md",
    "benchmarks/results/earlier.md": "earlier.md",
    "examples/token_recycling/README.md": "token_recycling.md",
    "tinyworld/README.md": "tinyworld.md",
}
HOME = {page: source for source, page in TAKEN_IN.items()}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^][]*)\]\(([^)\s]+)\)")


def home_of(page: str) -> str:
    """Where in the repository a page of the site lies."""
    return HOME.get(page, f"docs/{page}")


def with_links(markdown: str, page: str) -> str:
    """A page with its links as the site has them; what is fenced stays as it was.

    Raises:
        FileNotFoundError: a link leads to nothing.
    """
    parts: list[str] = []
    end = 0
    for fence in FENCE.finditer(markdown):
        parts += [_resolved(markdown[end : fence.start()], page), fence[0]]
        end = fence.end()
    return "".join((*parts, _resolved(markdown[end:], page)))


def _resolved(markdown: str, page: str) -> str:
    return LINK.sub(lambda link: resolve(link[1], link[2], page), markdown)


def resolve(text: str, target: str, page: str) -> str:
    """One link of a page.

    Raises:
        FileNotFoundError: it leads to nothing.
    """
    path, mark, anchor = target.partition("#")
    if not path or ":" in path:
        return f"[{text}]({target})"
    source = home_of(page)
    there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / there).exists():
        raise FileNotFoundError(f"{source}: the link to {target} leads to nothing")
    if there in TAKEN_IN:
        there = TAKEN_IN[there]
    elif there.startswith("docs/") and there.endswith(".md"):
        there = there.removeprefix("docs/")
    else:
        return text if there in text else f"{text} (`{there}`)"
    return f"[{text}]({there}{mark}{anchor})"
