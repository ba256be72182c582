"""What our workers add to SGLang's, whatever the family: they watch, and learn between rounds.

Letters: B requests, S = K + 1 verified rows of each, T prompt rows end to end.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.collector import Prefill, Prompt, Verified
from cosched.engines.sglang.worker.serving import ServedDraft
from cosched.engines.sglang.worker.supported import WITH_LENGTHS, check_resolved
from cosched.engines.sglang.worker.taps import HiddenTap, Stopwatch, owned
from cosched.engines.sglang.worker.target import ServedTarget
from cosched.errors import ConfigError
from cosched.records import Segment
from cosched.training.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from cosched.engines.sglang.worker.adaptation import Adaptation
    from cosched.engines.sglang.worker.paths import Paths
    from cosched.records import Acceptance

_LEAST_ROWS = 4096  # watched at once; prompts are longer than verifications
_ALIGNMENT = 64  # requests that SGLang may round the batch of a CUDA graph up to


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker has for who builds its adaptation.

    ``check`` refuses what cannot be watched, and, told that the number of drafted tokens changes, what
    that does not go with; ``num_draft_tokens`` is the most. ``serve(names)`` gives the tensors of the
    serving draft by the names of the drafter's network; ``refresh`` makes anew what SGLang derived from
    them. ``acceptance`` is how SGLang accepts a drafted token of a request that samples. ``replica`` is which
    of the server's data-parallel ``replicas`` this is.
    """

    check: Callable[[bool], None]
    algorithm: str
    target: ServedTarget
    ranks: Ranks
    num_draft_tokens: int
    serve: Callable[[Iterable[str]], ServedDraft]
    refresh: Callable[[], None]
    acceptance: Acceptance
    replica: int = 0
    replicas: int = 1


class AdaptedWorker:
    """Mixed in before a worker of SGLang's, which it leaves as it is."""

    build: ClassVar[Callable[[WorkerParts], Adaptation]]
    takes_trees: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
                num_draft_tokens=self._longest(),
                serve=lambda names: ServedDraft(model, names),
                refresh=self._refresh,
                acceptance=_acceptance(device),
                replica=compat.replica(self.server_args.dp_size),
                replicas=self.server_args.dp_size,
            )
        )
        if self.adaptation.watching:
            most = self.server_args.max_running_requests or 0
            rows = graph_rows(most, self.speculative_num_draft_tokens)
            self._tap = HiddenTap(target.model, rows, target.embedding.weight)

    # --- what a family gives ---------------------------------------------------------------

    def _draft_model(self) -> nn.Module:
        """SGLang's model of the draft."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Make anew what was derived from the draft's weights."""

    def _longest(self) -> int:
        """The most drafted tokens that can be accepted in a round."""
        return self.speculative_num_draft_tokens - 1

    def _check(self, changes_length: bool) -> None:
        """Refuse what cannot be watched, and what cannot change the number of drafted tokens.

        Raises:
            ConfigError: an argument of SGLang's.
        """
        spec = compat.get_spec()
        if (spec.speculative_eagle_topk or 1) != 1 and (changes_length or not self.takes_trees):
            raise ConfigError(
                f"--speculative-eagle-topk {spec.speculative_eagle_topk}: cosched adapts chains here; "
                f"use 1"
            )
        if rejection_sampling() and str(self.device).startswith("cpu"):
            raise ConfigError(
                "--speculative-use-rejection-sampling: not on a CPU; leave it out, and the target "
                "draws the draft's best tokens"
            )
        # SGLang itself refuses, or leaves out, by the names of its own algorithms.
        for name in ("attn_tp_input_scattered", "linear_replayssm_spec"):
            if getattr(self.server_args, f"enable_{name}", False):
                flag = f"--enable-{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: not supported with cosched; leave it out")
        check_resolved(self.server_args)
        # What the ranks came to be: from 0.5.22 on the arguments do not tell.
        check_resolved(compat.get_parallel())
        if changes_length:
            check_resolved(self.server_args, WITH_LENGTHS)

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
                rows, temperature = None, temperature_of(request.sampling_params)
                if teacher_TX is not None and not compat.has_pictures(request):
                    kept = slice(end - min(length, self.adaptation.window), end)
                    rows = Segment(
                        request_id=request.rid,
                        start=start + length - (kept.stop - kept.start),
                        tokens_R1=torch.cat((tokens_T[kept], next_B[i : i + 1])),
                        features_RF=None if features is None else owned(features[kept]),
                        teacher_RX=owned(teacher_TX[kept]),
                        temperature=temperature,
                    )
                prompt_length = len(request.origin_input_ids)
                limit = request.sampling_params.max_new_tokens
                longest = None if limit is None else prompt_length + limit
                prompts.append(
                    Prompt(request.rid, start, length, prompt_length, rows, longest, temperature)
                )
            return tuple(prompts)

        if not batch.forward_mode.is_idle():
            self.adaptation.began(one for one in batch.reqs if not compat.is_health_check(one))
            self.adaptation.prefilled(prefill)

    def saw_verification(
        self,
        batch: Any,
        tokens: Tensor,
        output: Any,
        features: Any,
        marks: tuple[Any, Any, Any],
        find_paths: Callable[[], Paths] | None = None,
    ) -> None:
        """A verification was launched; ``tokens`` are its anchors and drafts, request by request.

        Of trees ``find_paths`` finds the rows that were accepted and what might have been behind them; SGLang
        has what came out, and the features, in their order already.
        """
        watching = self._tap is not None and self.adaptation.watching
        requests = batch.reqs

        def verified() -> Verified:
            size = len(requests)
            paths = find_paths() if find_paths else None
            teacher = self._tap.rows(tokens.numel()) if watching and self._tap else None
            rows = features if watching else None
            if paths is None:
                kept = slice(None)
                tokens_BS = tokens.long().view(size, -1).clone()
                teacher = None if teacher is None else owned(teacher)
            else:
                kept = slice(paths.rows_BS.shape[1])
                tokens_BS = tokens.long()[paths.rows_BS]
                teacher = None if teacher is None else teacher[paths.rows_BS.flatten()]
            return Verified(
                iteration=batch.forward_iter,
                request_ids=tuple(request.rid for request in requests),
                version=self.adaptation.version,
                tokens_BS=tokens_BS,
                decided_BS=output.next_token_ids.long().view(size, -1)[:, kept].clone(),
                features_BSF=None
                if rows is None
                else owned(rows.view(size, -1, rows.shape[-1])[:, kept]),
                teacher_BSX=None if teacher is None else teacher.view(size, -1, teacher.shape[-1]),
                seconds=self._stopwatch.between(*marks),
                lengths=None if paths is None else paths.lengths,
            )

        if not batch.forward_mode.is_idle():
            self.adaptation.verified(verified)


def graph_rows(max_running: int, rows_each: int) -> int:
    """Rows of the largest verification that a CUDA graph can be captured for, and no fewer than usual."""
    batch = -(-max_running // _ALIGNMENT) * _ALIGNMENT
    return max(_LEAST_ROWS, batch * rows_each)


def _acceptance(device: torch.device) -> Acceptance:
    """The draft's best token is drafted, and the target draws it or not.

    A CPU does so too (``cosched.engines.sglang.cpu.sampling``); for AMD's and Intel's devices SGLang has
    no kernel, and takes the best tokens whatever the temperature.
    """
    if rejection_sampling():
        return "sampled"
    return "greedy" if device.type == "xpu" or torch.version.hip else "target_only"


def rejection_sampling() -> bool:
    """Whether drafted tokens are drawn from the draft, and speculative sampling corrects for that."""
    return bool(getattr(compat.get_spec(), "speculative_use_rejection_sampling", False))


def temperature_of(sampling_params: Any) -> float:
    """At which a request samples, 0 where it is greedy: SGLang says so by a top-k of one token."""
    return 0.0 if sampling_params.top_k <= 1 else float(sampling_params.temperature)


def is_prefill(batch: Any) -> bool:
    """Whether this batch runs prompts, as SGLang's own workers ask."""
    return batch.forward_mode.is_extend() or batch.is_extend_in_batch
