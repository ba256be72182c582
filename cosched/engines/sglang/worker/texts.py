"""What clients asked and were answered, where an operator has asked for it: ``record.text``."""

from __future__ import annotations

import logging
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cosched.loop.roles import Sink

RUNNING = 4096  # requests that are waited for; the oldest are forgotten
OPT_OUT = "cosched_record"  # in a request's custom_params; false: it is left out

logger = logging.getLogger("cosched")


class Texts:
    """Hands a share of the requests to ``sink``, each once it has finished.

    Which ones goes by a checksum of their names, so nothing is drawn and a name is always in or out. Tokens are
    made text in a thread of its own, by ``decode``: no round waits for that.
    """

    def __init__(self, sink: Sink, share: float, decode: Callable[[Sequence[int]], str]) -> None:
        self._sink = sink
        self._share = share
        self._decode = decode
        self._running: OrderedDict[str, Any] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cosched-texts")

    def began(self, request: Any) -> None:
        """A prompt is run, or a piece of one; the request is SGLang's."""
        if not is_recorded(request.rid, self._share) or _opted_out(request):
            return
        self._running[request.rid] = request
        if len(self._running) > RUNNING:
            self._running.popitem(last=False)

    def finished(self, request_id: str) -> None:
        """It is done, or was aborted: what there is of its answer is kept."""
        request = self._running.pop(request_id, None)
        if request is None:
            return
        try:
            prompt, answer = list(request.origin_input_ids), compat.answer_of(request)
        except Exception:
            # A version of SGLang may have it elsewhere, and learning must not end of that.
            logger.exception("cosched could not record the text of request %s", request_id)
            return
        self._thread.submit(self._write, request_id, prompt, answer)

    def _write(self, request_id: str, prompt: list[int], answer: list[int]) -> None:
        try:
            texts = {"prompt": self._decode(prompt), "answer": self._decode(answer)}
        except Exception:
            # A tokenizer may raise anything, and the thread would keep it to itself.
            logger.exception("cosched could not record the text of request %s", request_id)
            return
        self._sink.emit("text", id=request_id, **texts)

    def close(self) -> None:
        """Write what is waiting."""
        self._thread.shutdown()


def is_recorded(request_id: str, share: float) -> bool:
    """Whether a request is among the share that is recorded."""
    return zlib.crc32(request_id.encode()) < share * 2**32


def _opted_out(request: Any) -> bool:
    custom = getattr(request.sampling_params, "custom_params", None)
    return isinstance(custom, dict) and custom.get(OPT_OUT) is False
