"""Models by the names that they have in this machine's Hugging Face cache; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/model


def model_folder(path: str) -> str | None:
    """The folder of a model: ``path`` itself if there is one, else that of ``owner/model`` cached.

    None where neither is there; a cached model without weights (its tokenizer alone, say) is none.
    """
    if Path(path).exists():
        return path
    if not NAME.fullmatch(path):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    weights = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    return str(folder) if weights else None


def not_found(path: str) -> str:
    """What was looked for, and how to get it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not NAME.fullmatch(path):
        return (
            f"nothing at {path}; give a folder in Hugging Face format, or the name owner/model of "
            f"one in the Hugging Face cache ({HF_HUB_CACHE})"
        )
    return (
        f"nothing at {path}, and the Hugging Face cache ({HF_HUB_CACHE}) has no model of that name "
        f"with its weights; give a folder in Hugging Face format, or fetch it: hf download {path}"
    )
