"""What our workers add to SGLang's, whatever the family: they watch, and learn between rounds.

Letters: B requests, S = K + 1 verified rows of each, T prompt rows end to end.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.collector import Prefill, Prompt, Verified
from cosched.engines.sglang.worker.serving import ServedDraft
from cosched.engines.sglang.worker.taps import HiddenTap, Stopwatch, owned
from cosched.engines.sglang.worker.target import ServedTarget
from cosched.errors import ConfigError
from cosched.records import Segment
from cosched.training.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from cosched.engines.sglang.worker.adaptation import Adaptation
    from cosched.records import Acceptance

_GRAPH_ROWS = 4096  # rows of a verification that CUDA graphs may be captured for, at most


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker has for who builds its adaptation.

    ``check`` refuses what cannot be watched. ``serve(names)`` gives the tensors of the serving draft
    by the names of the drafter's network; ``refresh`` makes anew what SGLang derived from them.
    ``acceptance`` is how SGLang accepts a drafted token of a request that samples.
    """

    check: Callable[[], None]
    algorithm: str
    target: ServedTarget
    ranks: Ranks
    num_draft_tokens: int
    serve: Callable[[Iterable[str]], ServedDraft]
    refresh: Callable[[], None]
    acceptance: Acceptance


class AdaptedWorker:
    """Mixed in before a worker of SGLang's, which it leaves as it is."""

    build: ClassVar[Callable[[WorkerParts], Adaptation]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        os.environ.setdefault("LOCAL_RANK", str(max(0, self.gpu_id)))  # DeepSpeed's device
        runner = self.target_worker.model_runner
        target = ServedTarget(runner, getattr(self.target_worker, "tokenizer", None))
        self._tap: HiddenTap | None = None
        model, group = self._draft_model(), compat.get_tp_group()
        device = target.embedding.weight.device
        self._stopwatch = Stopwatch(device)
        self.adaptation = type(self).build(
            WorkerParts(
                check=self._check,
                algorithm=compat.get_spec().speculative_algorithm,
                target=target,
                ranks=Ranks(group.rank_in_group, list(group.ranks), device),
                num_draft_tokens=self.speculative_num_draft_tokens - 1,
                serve=lambda names: ServedDraft(model, names),
                refresh=self._refresh,
                acceptance=_acceptance(device),
            )
        )
        if self.adaptation.watching:
            self._tap = HiddenTap(target.model, _GRAPH_ROWS, target.embedding.weight)

    # --- what a family gives ---------------------------------------------------------------

    def _draft_model(self) -> nn.Module:
        """SGLang's model of the draft."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Make anew what was derived from the draft's weights."""

    def _check(self) -> None:
        """Refuse what cannot be watched.

        Raises:
            ConfigError: an argument of SGLang's.
        """
        spec = compat.get_spec()
        if (spec.speculative_eagle_topk or 1) != 1:
            raise ConfigError(
                f"--speculative-eagle-topk {spec.speculative_eagle_topk}: cosched adapts chains; "
                f"use 1"
            )
        if spec.speculative_adaptive:
            raise ConfigError("--speculative-adaptive: cosched needs a fixed number of drafts")
        # The last two SGLang itself refuses, or leaves out, by the names of its own algorithms.
        for name in ("attn_tp_input_scattered", "linear_replayssm_spec"):
            if getattr(self.server_args, f"enable_{name}", False):
                flag = f"--enable-{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: not supported with cosched; leave it out")
        parallel = compat.get_parallel()
        if parallel.attn_dp_size != 1:  # which --enable-dp-attention sets, too
            raise ConfigError(
                f"--attn-dp-size {parallel.attn_dp_size} (--enable-dp-attention): not supported with "
                f"cosched; use 1"
            )
        if parallel.pp_size != 1:
            raise ConfigError(f"--pp-size {parallel.pp_size}: not supported with cosched; use 1")

    # --- what SGLang calls -----------------------------------------------------------------

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: list[int], batch_size: int = 0
    ) -> None:
        super().on_verify_complete_cpu(num_correct_drafts_per_req, batch_size)
        self.adaptation.counted(num_correct_drafts_per_req)

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:
        super().note_request_finished(rid=rid, natural_stop=natural_stop)
        self.adaptation.finished(rid)

    # --- watching --------------------------------------------------------------------------

    def saw_prefill(self, batch: Any, tokens_T: Tensor, output: Any, features: Any) -> None:
        """A prefill was launched; ``tokens_T`` are the ids before SGLang rotated them."""
        watching = self._tap is not None and self.adaptation.watching

        def prefill() -> Prefill:
            next_B = compat.prefill_tail_tokens(batch, output.next_token_ids)
            teacher_TX = self._tap.rows(len(tokens_T)) if watching and self._tap else None
            prompts: list[Prompt] = []
            end = 0
            for i, request in enumerate(batch.reqs):
                start, length = batch.prefix_lens[i], batch.extend_lens[i]
                end += length
                if compat.is_health_check(request):
                    continue
                rows = None
                if teacher_TX is not None:
                    kept = slice(end - min(length, self.adaptation.window), end)
                    rows = Segment(
                        request_id=request.rid,
                        start=start + length - (kept.stop - kept.start),
                        tokens_R1=torch.cat((tokens_T[kept], next_B[i : i + 1])),
                        features_RF=None if features is None else owned(features[kept]),
                        teacher_RX=owned(teacher_TX[kept]),
                    )
                prompt_length = len(request.origin_input_ids)
                limit = request.sampling_params.max_new_tokens
                longest = None if limit is None else prompt_length + limit
                prompts.append(Prompt(request.rid, start, length, prompt_length, rows, longest))
            return tuple(prompts)

        if not batch.forward_mode.is_idle():
            self.adaptation.prefilled(prefill)

    def saw_verification(
        self, batch: Any, tokens: Tensor, output: Any, features: Any, marks: tuple[Any, Any, Any]
    ) -> None:
        """A verification was launched; ``tokens`` are its anchors and drafts, request by request."""
        watching = self._tap is not None and self.adaptation.watching
        requests = batch.reqs

        def verified() -> Verified:
            size = len(requests)
            teacher = owned(self._tap.rows(tokens.numel())) if watching and self._tap else None
            rows = features if watching else None
            return Verified(
                request_ids=tuple(request.rid for request in requests),
                version=self.adaptation.version,
                tokens_BS=tokens.long().view(size, -1).clone(),
                decided_BS=output.next_token_ids.long().view(size, -1).clone(),
                features_BSF=None if rows is None else owned(rows).view(size, -1, rows.shape[-1]),
                teacher_BSX=None if teacher is None else teacher.view(size, -1, teacher.shape[-1]),
                seconds=self._stopwatch.between(*marks),
            )

        if not batch.forward_mode.is_idle():
            self.adaptation.verified(verified)


def _acceptance(device: torch.device) -> Acceptance:
    """The draft's best token is drafted, and the target draws it or not; a CPU has no kernel for that."""
    if device.type == "cpu":
        return "greedy"
    rejection = getattr(compat.get_spec(), "speculative_use_rejection_sampling", False)
    return "sampled" if rejection else "target_only"


def is_prefill(batch: Any) -> bool:
    """Whether this batch runs prompts, as SGLang's own workers ask."""
    return batch.forward_mode.is_extend() or batch.is_extend_in_batch
