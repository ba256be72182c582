"""DFlash in SGLang, watched: features on their way into the draft's cache, blocks when judged."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker import AdaptedWorker

if TYPE_CHECKING:
    from torch import Tensor, nn


class DFlashWorker(AdaptedWorker, compat.DFlashWorkerV2):
    """SGLang's DFLASH worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._features: Tensor | None = None
        self._block: Tensor | None = None
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
        self._features = self._block = None
        tokens_T = batch.input_ids
        output = super().forward_batch_generation(batch, *args, **kwargs)
        if self._block is not None:
            marks = started, self._drafted, self._stopwatch.mark()
            self.saw_verification(batch, self._block.flatten(), output, self._features, marks)
        elif self._features is not None:
            self.saw_prefill(batch, tokens_T, output, self._features)
        return output

    def _append_target_hidden_to_draft_kv_by_loc(
        self, *, target_hidden: Tensor, **kwargs: Any
    ) -> None:
        self._features = target_hidden
        super()._append_target_hidden_to_draft_kv_by_loc(target_hidden=target_hidden, **kwargs)

    def _accept_block(self, *, candidates: Tensor, **kwargs: Any) -> Any:
        self._block = candidates
        return super()._accept_block(candidates=candidates, **kwargs)

    def _draft_model(self) -> nn.Module:
        return self.draft_model

    def _refresh(self) -> None:
        if self._fused_kv_helper is not None:  # it holds stacked copies of the keys' weights
            self._init_fused_kv_helper()
