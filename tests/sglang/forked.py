"""SGLang's processes forked from the one that has imported it: a plugin of the tests'.

SGLang spawns its scheduler and its detokenizer, and each imports all of SGLang again, which takes more
of a short test's time than what it tests. ``COSCHED_TEST_SPAWN=1`` leaves that as users have it, which
test_serve.py, the demo and the real model do. Never installed with cosched.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any


def install() -> None:
    if os.environ.get("COSCHED_TEST_SPAWN") == "1":
        return
    choose = multiprocessing.set_start_method

    def fork(_method: str | None, force: bool = False) -> Any:
        choose("fork", force=force)

    multiprocessing.set_start_method = fork
