"""Held-out texts as prompts and documents: JSON lines with ``id``, ``source`` and ``text``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cosched.tinyworld.corpus import Corpus, Document

PROMPT_CHARACTERS = 400
DOCUMENT_CHARACTERS = 9000
NUM_PROMPTS = 8
NUM_DOCUMENTS = 6


def write_texts(corpus: Corpus, prompts: Path, texts: Path) -> None:
    """One file for each domain in each folder."""
    for folder, characters, count in (
        (prompts, PROMPT_CHARACTERS, NUM_PROMPTS),
        (texts, DOCUMENT_CHARACTERS, NUM_DOCUMENTS),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        for domain, documents in corpus.items():
            excerpts = _excerpts(domain, documents, characters, count)
            _write(folder / f"{domain}.jsonl", excerpts)


def _excerpts(
    domain: str, documents: Sequence[Document], characters: int, count: int
) -> list[dict[str, str]]:
    """The beginnings of ``count`` long held-out documents, spread over the domain."""
    long_enough: list[Document] = [
        document
        for document in documents
        if document.split == "heldout" and len(document.text) >= characters
    ]
    chosen = long_enough[:: max(1, len(long_enough) // count)][:count]
    return [
        {
            "id": f"{domain}-{index}",
            "source": document.source,
            "text": document.text[:characters].rsplit(" ", 1)[0],
        }
        for index, document in enumerate(chosen)
    ]


def _write(path: Path, records: list[dict[str, str]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
