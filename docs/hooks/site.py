"""The hook of ``mkdocs.yml``: what the site has beside the files of ``docs/``.

Pages that live elsewhere in the repository are taken in from there (``links.TAKEN_IN``), and what can
be read from the code is read when the site is built: ``<!-- generated: NAME -->`` in a page stands
for it (``GENERATED``). So neither can be out of date.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from links import ROOT, TAKEN_IN, with_links
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from repository_pages import commands_page, metrics_table, modules_page, scalars_table, suites_table
from settings_page import settings_page

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

GENERATED = {
    "commands": commands_page,
    "metrics": metrics_table,
    "modules": modules_page,
    "scalars": scalars_table,
    "settings": settings_page,
    "suites": suites_table,
}
PLACE = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the pages that live elsewhere."""
    for source, page in TAKEN_IN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links to where the site has what they name, then fill in what is read from the code."""
    try:
        linked = with_links(markdown, page.file.src_uri)
    except FileNotFoundError as error:
        raise PluginError(str(error)) from error
    return PLACE.sub(_generated, linked)


def _generated(place: re.Match[str]) -> str:
    if place[1] not in GENERATED:
        raise PluginError(f"<!-- generated: {place[1]} -->: there are {', '.join(GENERATED)}")
    return GENERATED[place[1]]()
