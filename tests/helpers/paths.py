"""Where the repository's own files are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINYWORLD = ROOT / "tinyworld"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
