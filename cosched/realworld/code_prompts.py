"""The 164 public programming problems of HumanEval as chat prompts."""

from __future__ import annotations

import gzip
import json
import shutil
from typing import TYPE_CHECKING, Any

from cosched.errors import RealWorldError
from cosched.realworld.folders import sealed_folder
from cosched.realworld.pins import CODE_PROMPTS

if TYPE_CHECKING:
    from pathlib import Path

FILE = "code.jsonl"
ABOUT = f"""# Code prompts

`{FILE}` asks, in our words, for the functions of HumanEval (Chen et al., "Evaluating Large Language
Models Trained on Code", 2021), which the Python package `{CODE_PROMPTS.package}` \
{CODE_PROMPTS.version} carries as
`{CODE_PROMPTS.member}` (SHA-256 `{CODE_PROMPTS.sha256}`).
They stay under its licence, {CODE_PROMPTS.licence} (`LICENSE`, where the package was at hand).
"""


def write_code_prompts(problems: Path, destination: Path, licence: Path) -> int:
    """Write the folder of the prompts, whole or not at all; returns how many there are.

    Raises:
        RealWorldError: the file is not what it should be, or the folder cannot be written.
    """
    try:
        with gzip.open(problems, "rt", encoding="utf-8") as file:
            records = [_prompt(json.loads(line)) for line in file if line.strip()]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise RealWorldError(f"{problems} is no file of problems: {error}") from error
    with sealed_folder(destination) as folder:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / FILE).write_text("".join(lines), encoding="utf-8")
        (folder / "README.md").write_text(ABOUT, encoding="utf-8")
        if licence.is_file():
            shutil.copyfile(licence, folder / "LICENSE")
    return len(records)


def _prompt(problem: dict[str, Any]) -> dict[str, Any]:
    words = (
        "Complete the following Python function. Write out the whole function, then explain how "
        f"it works.\n\n```python\n{problem['prompt'].strip()}\n```"
    )
    return {"id": problem["task_id"], "messages": [{"role": "user", "content": words}]}
