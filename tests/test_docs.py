"""README and documentation against what they describe: commands, files, keys and settings."""

import re
from pathlib import Path

import msgspec
import pytest
from typer.main import get_command

from cosched.cli import app
from cosched.engines.sglang.worker.operator import Status

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "realworld/README.md")
] + sorted((ROOT / "docs").glob("*.md"))  # fmt: skip
EITHER = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    """The modules of docs/hooks import one another by name, as MkDocs loads them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))


def code_of(page: Path) -> str:
    """What a page shows as code, fenced or in a line."""
    return "\n".join(EITHER.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_what_exists(page):
    """Commands, make targets, files and keys get renamed, and a README that is not run goes stale."""
    from settings_page import key_paths

    code = code_of(page)
    root = get_command(app)
    commands = set(root.commands)
    for command in re.findall(r"\bcosched ([a-z]+)\b", code):
        assert command in commands, f"cosched {command}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
        assert target in targets, f"make {target}"
    folders = "configs|cosched|drafters|losses|schedulers|tests|benchmarks|examples|tinyworld|realworld|docs"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", code):
        # realworld/drafts/ is filled once its drafts are trained.
        assert (ROOT / path).exists() or path.startswith("realworld/drafts"), path
    known = key_paths()
    for key in re.findall(r"(?<![\w./-])((?:adapt|drafter|engine|workload)(?:\.[a-z_]+)+)", code):
        free = key.startswith("engine.arguments.") or key.endswith(".key")  # drafter.key=value
        assert key in known or free, key


def test_the_readme_reads_a_status_by_its_fields():
    """An operator looks for the names that the README gives in what the server answers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## See that it works")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)`", "".join(row for row in section.splitlines() if row[:1] == "|"))
    fields = {field for field in named if field not in {"True", "None"}}
    assert {"draft_version", "failure"} <= fields <= set(Status.__struct_fields__)


def test_the_readme_is_short_and_has_one_block_of_figures():
    """An operator reads it in three minutes; figures are replaced between two marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 1000
    assert text.count("<!-- figures:begin -->") == text.count("<!-- figures:end -->") == 1


def test_every_setting_is_explained_by_its_class():
    """The reference takes the meaning of a key from docstrings: one that none names has no meaning."""
    from settings_page import docstrings, keys, settings_classes

    silent = [
        f"{cls.__name__}.{key}"
        for cls in dict.fromkeys(settings_classes())
        for key in keys(cls)
        if not re.search(rf"``[^`]*\b{key}\b", docstrings(cls)) and not is_section(cls, key)
    ]
    assert not silent


def is_section(cls: type, key: str) -> bool:
    """Whether a key holds a section, which explains itself, or says which section it is."""
    from settings_page import ROLES

    kind = {f.name: f.type for f in msgspec.inspect.type_info(cls).fields}[key]
    return isinstance(kind, msgspec.inspect.StructType) or key in {*ROLES, "kind"}


def test_the_reference_has_every_key_with_its_default():
    """It must not be possible for a setting to be missing: all that the schema checks is written."""
    from settings_page import keys, settings_classes, settings_page

    page = settings_page()
    for cls in settings_classes():
        for key in keys(cls):
            assert f"| `{key}` |" in page, f"{cls.__name__}.{key}"
    assert "| `lr` | number, > 0 | `0.0003` | ✓ |" in page
    assert "| `samples` | whole number, ≥ 1 | `1` |  |" in page  # a server has none
    assert "| `trial_updates` | whole number, ≥ 1 | `6` |" in page
    assert not re.search(r"\\[a-z]{2}", page), "a formula's LaTeX has no words yet (SYMBOLS)"


def test_a_setting_of_a_kind_without_words_is_refused():
    """A type that the reference cannot describe stops the build instead of being left out."""
    from settings_page import _section

    class Odd(msgspec.Struct):
        """``moment`` is of a type that no setting has."""

        moment: complex = 0j

    with pytest.raises(TypeError, match="moment"):
        list(_section(Odd, "odd", {Odd: "odd"}))


def test_links_lead_to_pages_of_the_site_to_paths_or_stop_the_build():
    """A page is read in the repository and in the site; each reader's links have to work."""
    from links import resolve, with_links

    assert resolve("why", "docs/concepts.md#why", "index.md") == "[why](concepts.md#why)"
    assert resolve("how", "../README.md#serve", "serving.md") == "[how](index.md#serve)"
    assert resolve("`a.yaml`", "../configs/quickstart.yaml", "serving.md") == (
        "`a.yaml` (`configs/quickstart.yaml`)"
    )
    assert (
        resolve("paper", "https://arxiv.org/abs/1", "index.md")
        == "[paper](https://arxiv.org/abs/1)"
    )
    with pytest.raises(FileNotFoundError, match=r"docs/serving.md.*nowhere.md"):
        resolve("gone", "nowhere.md", "serving.md")
    fenced = "```\n[a](nowhere.md)\n```"
    assert with_links(fenced, "serving.md") == fenced


def test_the_commands_page_has_every_option():
    """It is read from the parser: an option that is added is on it."""
    from repository_pages import commands_page, metrics_table, modules_page

    page = commands_page()
    for word in ("cosched realworld build", "`-c`, `--config`", "**Required.**", "`--jobs`"):
        assert word in page
    assert "`cosched_draft_version`" in metrics_table()
    assert "`cosched_evicted_requests_total`" in metrics_table()
    assert "| `coscheduler.py` | " in modules_page()
