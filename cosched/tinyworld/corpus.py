"""Text of this machine in three domains, cleaned, deduplicated and split by file.

``code``        the Python standard library
``manuals``     English manuals: Vim's help, Perl's pods, man pages, the common licences
``translated``  man pages in German and French

A file goes to ``heldout`` or ``train`` by a hash of its path, so the split needs no random state
and no two runs disagree about it.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import sysconfig
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cosched.errors import TinyWorldError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Corpus = Mapping[str, Sequence["Document"]]
    """Documents by domain."""

DOMAINS = ("code", "manuals", "translated")
HELDOUT_SHARE = 20  # one file in this many is held out
MIN_CHARACTERS = 1500

Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class Document:
    """One cleaned file: where it came from and its text."""

    source: str
    text: str

    @property
    def split(self) -> Split:
        digest = hashlib.sha256(self.source.encode()).digest()
        return "heldout" if int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0 else "train"


@dataclass(frozen=True, slots=True)
class Source:
    """A glob under a root, read up to ``max_megabytes`` of cleaned text."""

    root: Path
    glob: str
    max_megabytes: float


def sources() -> dict[str, tuple[Source, ...]]:
    """Every source by domain; one that this machine lacks yields nothing."""
    share = Path("/usr/share")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    man = share / "man"
    return {
        "code": (Source(stdlib, "**/*.py", 16.0),),
        "manuals": (
            Source(share / "vim", "*/doc/*.txt", 6.0),
            Source(share / "common-licenses", "*", 1.0),
            Source(share / "perl", "**/*.pod", 2.0),
            Source(stdlib / "pydoc_data", "topics.py", 1.0),
            *(Source(man / f"man{section}", "*", 2.0) for section in (2, 3, 5, 7, 8)),
        ),
        "translated": tuple(Source(man / language, "**/*", 3.0) for language in ("de", "fr")),
    }


def read_corpus() -> Corpus:
    """All documents of all domains.

    Raises:
        TinyWorldError: the machine has no text of a domain.
    """
    return {domain: tuple(documents(domain)) for domain in DOMAINS}


def documents(domain: str) -> Iterator[Document]:
    """Cleaned documents of a domain, in path order, no text twice.

    Raises:
        TinyWorldError: the machine has no text of that domain.
    """
    seen: set[bytes] = set()
    for source in sources()[domain]:
        budget = int(source.max_megabytes * 1e6)
        for path in sorted(source.root.glob(source.glob)):
            if budget <= 0:
                break
            text = _read(path)
            if text is None or len(text) < MIN_CHARACTERS:
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            budget -= len(text)
            yield Document(str(path.relative_to(source.root.parent)), text)
    if not seen:
        roots = ", ".join(str(source.root) for source in sources()[domain])
        raise TinyWorldError(f"no text for the domain {domain!r} under {roots}")


def _read(path: Path) -> str | None:
    if not path.is_file() or "site-packages" in path.parts:
        return None
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None  # binary test data and legacy encodings are not prose
    return deroff(text) if "/man/" in str(path) else text.replace("\t", "    ")


_ESCAPES = {
    r"\-": "-",
    r"\e": "\\",
    r"\&": "",
    r"\|": "",
    r"\^": "",
    r"\ ": " ",
    r"\~": " ",
    r"\0": " ",
    r"\%": "",
    r"\/": "",
    r"\,": "",
    r"\c": "",
    r"\:": "",
    r"\(aq": "'",
    r"\(cq": "'",
    r"\(oq": "'",
    r"\(lq": '"',
    r"\(rq": '"',
    r"\(dq": '"',
    r"\(em": " - ",
    r"\(en": "-",
    r"\(bu": "*",
    r"\(co": "(c)",
    r"\(ga": "`",
    r"\(ha": "^",
    r"\(ti": "~",
    r"\(rs": "\\",
}
_ESCAPE = re.compile("|".join(re.escape(key) for key in sorted(_ESCAPES, key=len, reverse=True)))
_FONT = re.compile(r"\\f(\[[^\]]*\]|\(..|.)|\\s[-+]?\d+|\\m\[[^\]]*\]|\\[*n](\[[^\]]*\]|\(..|.)")
_ACCENT = re.compile(r"\\(?:\((.)([A-Za-z])|\[([:'`^,~])([A-Za-z])\])")
_ACCENTS = {
    ":": "\u0308",
    "'": "\u0301",
    "`": "\u0300",
    "^": "\u0302",
    ",": "\u0327",
    "~": "\u0303",
}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')
_TEXT_MACROS = {"B", "I", "BR", "IR", "RB", "BI", "IB", "RI", "SM", "SB", "Nm", "Fl", "Ar", "Pa"}
_BREAK_MACROS = {"PP", "P", "LP", "TP", "IP", "HP", "sp", "br", "RS", "RE", "Pp", "It"}


def deroff(source: str) -> str:
    """Plain text of a man page: macros become line breaks and headings, paragraphs are filled."""
    blocks: list[str] = []
    paragraph: list[str] = []
    fill = True

    def end_paragraph() -> None:
        if paragraph:
            blocks.append(textwrap.fill(" ".join(paragraph), 88, break_on_hyphens=False))
            paragraph.clear()

    for line in source.splitlines():
        if line.startswith((r".\"", r"'\"", "'\\\"")):
            continue
        macro, _, rest = (
            line[1:].strip().partition(" ") if line[:1] in {".", "'"} else ("", "", line)
        )
        arguments = [quoted or bare for quoted, bare in _ARGUMENT.findall(rest)] if macro else []
        text = ""
        if not macro:
            text = _plain(rest)
        elif macro in _TEXT_MACROS:
            text = _plain(("" if len(macro) == 2 and macro != "SM" else " ").join(arguments))
        elif macro in {"SH", "SS", "Sh", "Ss"}:
            end_paragraph()
            blocks += ["", _plain(" ".join(arguments)).upper()]
        elif macro in _BREAK_MACROS:
            end_paragraph()
            blocks += ["", *([_plain(arguments[0])] if macro == "IP" and arguments else [])]
        elif macro in {"nf", "EX", "fi", "EE"}:
            end_paragraph()
            fill = macro in {"fi", "EE"}
        if text and fill and not text.startswith(" "):
            paragraph.append(text.strip())
        elif text or not macro:
            end_paragraph()
            blocks.append(text)
    end_paragraph()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip() + "\n"


def _plain(text: str) -> str:
    text = _ESCAPE.sub(lambda match: _ESCAPES[match[0]], _FONT.sub("", text))
    text = _ACCENT.sub(_accented, text)
    return re.sub(r"\\\(..|\\\[[^\]]*\]", "", text)


def _accented(match: re.Match[str]) -> str:
    mark, letter = match[1] or match[3], match[2] or match[4]
    if mark not in _ACCENTS:
        return "\u00df" if mark + letter == "ss" else ""
    return unicodedata.normalize("NFC", letter + _ACCENTS[mark])
