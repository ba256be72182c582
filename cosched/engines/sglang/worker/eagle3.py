"""EAGLE-3 in SGLang, watched: its verification has everything that teaches."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.adapted import AdaptedWorker, is_prefill
from cosched.engines.sglang.worker.paths import Paths, accepted_paths
from cosched.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class ChainWorker(AdaptedWorker):
    """For workers that draft, verify with ``verify``, and catch up."""

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        prefills = is_prefill(batch)
        self.adaptation.step(0 if prefills else len(batch.reqs))
        self._started = self._stopwatch.mark()
        if not prefills:
            return super().forward_batch_generation(batch, *args, **kwargs)
        tokens_T = batch.input_ids
        output = super().forward_batch_generation(batch, *args, **kwargs)
        self.saw_prefill(batch, tokens_T, output, output.logits_output.hidden_states)
        return output

    def verify(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafted = self._stopwatch.mark()
        drafts = batch.spec_info
        output = super().verify(batch, *args, **kwargs)
        marks = self._started, drafted, self._stopwatch.mark()
        features = output.logits_output.hidden_states

        def find_paths() -> Paths:
            return accepted_paths(output.accept_index, drafts.retrieve_next_token)

        find = find_paths if self.topk > 1 else None
        self.saw_verification(batch, drafts.draft_token, output, features, marks, find)
        return output

    def _longest(self) -> int:
        return self.speculative_num_steps

    def _draft_model(self) -> nn.Module:
        return self.draft_worker.draft_runner.model


class Eagle3Worker(ChainWorker, compat.EAGLEWorkerV2):
    """SGLang's EAGLE3 worker, which can draft another number of tokens every round, or trees."""

    takes_trees = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.adaptation.lengths is not None:
            compat.quiet_switches()
            self.adaptive_controller = compat.AdaptiveController(self, self.adaptation.lengths)

    def _check(self, changes_length: bool) -> None:
        super()._check(changes_length)
        if self.topk > 1 and not compat.says_paths():
            raise ConfigError(
                "drafter.top_k: this SGLang does not say which path of a tree it accepted; use 0.5.21 or "
                "newer, or drafter.top_k: 1"
            )
