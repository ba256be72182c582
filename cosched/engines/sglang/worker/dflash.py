"""DFlash in SGLang, watched: features on their way into the draft's cache, and drafted blocks."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.adapted import AdaptedWorker, is_prefill

if TYPE_CHECKING:
    from torch import Tensor, nn


class DFlashWorker(AdaptedWorker, compat.DFlashWorkerV2):
    """SGLang's DFLASH worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._features: Tensor | None = None
        draft = self.draft_model_runner
        forward = draft.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._drafted = self._stopwatch.mark()
            return output

        draft.forward = timed

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.adaptation.step()
        started = self._drafted = self._stopwatch.mark()
        self._features = None
        tokens_T, prefills = batch.input_ids, is_prefill(batch)
        output = super().forward_batch_generation(batch, *args, **kwargs)
        if prefills:
            self.saw_prefill(batch, tokens_T, output, self._features)
        else:
            marks = started, self._drafted, self._stopwatch.mark()
            # Anchors and drafts, in a buffer of SGLang's that the next round overwrites.
            block = self._draft_block_tokens_buf[: len(batch.reqs)]
            self.saw_verification(batch, block, output, self._features, marks)
        return output

    def _append_target_hidden_to_draft_kv_by_loc(
        self, *, target_hidden: Tensor, **kwargs: Any
    ) -> None:
        self._features = target_hidden
        super()._append_target_hidden_to_draft_kv_by_loc(target_hidden=target_hidden, **kwargs)

    def _draft_model(self) -> nn.Module:
        return self.draft_model

    def _refresh(self) -> None:
        if self._fused_kv_helper is not None:  # it holds stacked copies of the keys' weights
            self._init_fused_kv_helper()
