"""PARD in SGLang: a small language model that drafts its whole block in one pass, through masks.

A round's pass takes the tokens that were committed since the last one and K - 1 mask tokens.
The logits at the last committed token give the first drafted token, those at mask i the one i places
on. Keys and values of committed tokens stay in the draft's cache; those of masks are overwritten by
the next round. Verification is SGLang's own, of a chain.

How many tokens were committed is known to the device only, and a server that overlaps scheduling
must not wait for it: a pass always has 2K rows a request. Row j is committed token j, or a mask from
the last of these on; rows past the last mask are padding, which nothing sees and nobody reads.

What a round committed goes to the next one in the fields ``topk_index`` (the tokens) and ``topk_p``
(1 where there is one) of SGLang's record of a draft, which it filters, merges and relays as it does
for its own drafts.

A limit: what a request committed in its last round never went through the draft, so a later request
that finds the text in the prefix cache drafts from the keys of masks at those (at most K) positions.

Letters: B requests, K drafted tokens, W = K + 1 committed tokens at most, T = 2K rows.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from transformers.utils.hub import cached_file

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.pard_algorithm import NAME, num_rows
from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

GRAPH_RUNNER = "cosched.engines.sglang.worker.pard_graph:PardGraphRunner"
PADDING_SLOT = 0  # of every cache: SGLang writes there what nobody reads


class PardDraftWorker(compat.StandaloneDraftWorker):
    """Runs the draft: over prompts as they are, and once a round over what is new."""

    @property
    def _mask_token(self) -> int:
        return self.draft_runner.model_config.hf_config.pard_token  # `settle_arguments` saw to it

    def init_attention_backend(self) -> None:
        """Stay with the runner's own backend, which knows prefills and passes of fixed width."""
        self.draft_attn_backend = None
        self.draft_extend_attn_backend = None

    def _capture_cuda_graphs(self) -> None:
        """Let the runner replay the pass; one that has no graphs runs it."""
        self.cuda_graph_runner = None
        self.cuda_graph_runner_for_draft_extend = None
        compat.capture_passes(self.draft_runner, lambda: compat.resolve(GRAPH_RUNNER))

    # --- a round ---------------------------------------------------------------------------

    def draft(self, batch: Any) -> Any:
        """Draft K tokens a request, and arrange them as the chain that the target verifies."""
        num_requests, num_drafted = len(batch.seq_lens), self.speculative_num_steps
        drafted_BK = None if batch.forward_mode.is_idle() else self._propose(batch)
        return compat.build_eagle_verify_input(
            batch,
            batch.spec_info,
            self._topk1_parents_prealloc[:num_requests],
            self._topk1_score_indices_prealloc[:num_requests],
            drafted_BK,
            None,
            target_worker=self.target_worker,
            topk=1,
            num_steps=num_drafted,
            num_draft_tokens=num_drafted + 1,
            tree_mask_mode=self.tree_mask_mode,
            device=self.device,
        )

    def _propose(self, batch: Any) -> Tensor:
        """The pass: ``[B, K]`` drafted tokens."""
        num_drafted = self.speculative_num_steps
        width = num_rows(num_drafted)
        num_new_B = batch.spec_info.topk_p.sum(1).long()
        committed_BW = batch.spec_info.topk_index  # masks where nothing was committed
        num_requests = len(committed_BW)
        masks = committed_BW.new_full((num_requests, num_drafted - 1), self._mask_token)
        ids_BT = torch.cat((committed_BW, masks), 1)

        # The last committed token stands at `seq_lens`: the target has not run over it either.
        start_B = batch.seq_lens - num_new_B + 1
        at_T = torch.arange(width, device=self.device)
        is_read_BT = at_T < (num_new_B + num_drafted - 1)[:, None]
        last_B = batch.seq_lens + num_drafted - 1
        position_BT = torch.minimum(start_B[:, None] + at_T, last_B[:, None])
        table = self.req_to_token_pool.req_to_token
        slot_BT = table[batch.req_pool_indices.long()[:, None], position_BT].long()
        slot_BT = torch.where(is_read_BT, slot_BT, PADDING_SLOT)

        block = compat.ForwardBatch(
            forward_mode=compat.ForwardMode.TARGET_VERIFY,
            batch_size=num_requests,
            input_ids=ids_BT.flatten(),
            req_pool_indices=batch.req_pool_indices,
            seq_lens=start_B,
            # Backends size buffers by the host's lengths: no request starts behind its own.
            seq_lens_cpu=batch.seq_lens_cpu,
            seq_lens_sum=batch.seq_lens_sum,
            out_cache_loc=slot_BT.flatten(),
            positions=position_BT.flatten(),
            spec_algorithm=batch.spec_algorithm,
            spec_info=compat.make_draft_block_spec_info(draft_token_num=width, device=self.device),
            capture_hidden_mode=compat.CaptureHiddenMode.NULL,
            global_num_token_non_padded_cpu=num_requests * width,
        )
        compat.plan_rows(block, self.draft_runner)
        logits = self.draft_runner.forward(block).logits_output.next_token_logits
        best_BT = logits[:, : self._num_shared].argmax(-1).view(num_requests, width)
        ahead_K = torch.arange(num_drafted, device=self.device)
        return best_BT.gather(1, num_new_B[:, None] - 1 + ahead_K)

    @property
    def _num_shared(self) -> int:
        """Ids that both vocabularies have: tables of one tokenizer are padded differently."""
        runners = (self.draft_runner, self.target_worker.model_runner)
        return min(runner.model_config.vocab_size for runner in runners)

    # --- what the next round needs ---------------------------------------------------------

    def _draft_extend_for_prefill(
        self,
        batch: Any,
        target_hidden_states: Tensor | None,
        next_token_ids: Tensor,
        mm_input_embeds: Tensor | None = None,
        **plan: Any,
    ) -> Any:
        """Run the draft over the prompts' tokens; the first generated token is left for the round.

        STANDALONE runs it over the tokens rotated by one, and so never over the first. ``plan`` has
        the rows that the target wrote (``kv_loc_plan`` of 0.5.23); the draft writes the same.
        """
        del target_hidden_states, mm_input_embeds  # a PARD draft sees tokens only
        batch.spec_info = compat.EagleDraftExtendInput(
            num_tokens_per_req=1, num_tokens_for_logprob_per_req=1
        )
        forward_batch = compat.ForwardBatch.init_new(
            batch,
            self.draft_runner,
            capture_hidden_mode=compat.CaptureHiddenMode.NULL,
            return_hidden_states_before_norm=False,
            **plan,
        )
        forward_batch.return_logprob = False
        self.draft_runner.forward(forward_batch)
        state = compat.EagleDraftInput(
            bonus_tokens=next_token_ids,
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        )
        self._leave(state, next_token_ids[:, None], torch.ones_like(next_token_ids))
        return state

    def _draft_extend_for_decode(self, batch: Any, batch_result: Any, **plan: Any) -> None:
        """Note what the round committed; the next one runs the draft over it."""
        del batch, plan  # nothing is run, so no row is written
        num_requests = len(batch_result.accept_lens)
        committed_BW = batch_result.next_token_ids.view(
            num_requests, self.speculative_num_steps + 1
        )
        self._leave(batch_result.next_draft_input, committed_BW, batch_result.accept_lens)

    def _leave(self, state: Any, tokens: Tensor, num_new_B: Tensor) -> None:
        """Put the first ``num_new_B`` of ``tokens [B, at most W]`` into a draft's record."""
        at_W = torch.arange(self.speculative_num_steps + 1, device=tokens.device)
        is_new_BW = at_W < num_new_B[:, None]
        tokens_BW = torch.nn.functional.pad(tokens.long(), (0, len(at_W) - tokens.shape[1]))
        state.topk_index = torch.where(is_new_BW, tokens_BW, self._mask_token)
        state.topk_p = is_new_BW.float()


class PardWorker(compat.StandaloneWorkerV2):
    """The worker of COSCHED_PARD: SGLang's STANDALONE, with PARD's way of drafting."""

    def __init__(self, **arguments: Any) -> None:
        # STANDALONE forgets it, though methods that it inherits read it (neither from 0.5.21 on).
        self.ps = arguments.get("ps")
        super().__init__(**arguments)
        # STANDALONE's constructor names the class of its draft worker. Ours differs in what it
        # does, not in what it holds.
        self._draft_worker.__class__ = PardDraftWorker

    @property
    def last_shared_read_runner(self) -> Any:
        """Whose forward is the last of a round: no draft runs behind the verification."""
        return self._target_worker.model_runner

    def _validate_vocab_compatibility(self, target_vocab_size: int, target_tokenizer: Any) -> None:
        """Make sure that an id means the same token to both models.

        Raises:
            ConfigError: it does not.
        """
        del target_vocab_size  # only the length of a table, which is padded
        path = compat.get_spec().speculative_draft_model_path
        if target_tokenizer is None:
            return
        target = target_tokenizer.get_vocab()
        check_vocabularies(draft_vocabulary(path), target, path)
        vocab_size = self._draft_worker.draft_runner.model_config.vocab_size
        if vocab_size <= max(target.values()):
            raise ConfigError(
                f"the draft {path} has embeddings of {vocab_size} tokens, the target's tokenizer "
                f"has ids up to {max(target.values())}: this draft was made for another target"
            )


def draft_vocabulary(path: str) -> dict[str, int] | None:
    """Token ids of the draft's own tokenizer; None where it brings none."""
    try:
        file = cached_file(path, "tokenizer.json", local_files_only=True)
    except OSError:  # how transformers says that there is no such file
        return None
    return Tokenizer.from_file(file).get_vocab(with_added_tokens=True)


def check_vocabularies(
    draft: Mapping[str, int] | None, target: Mapping[str, int], path: str
) -> None:
    """Make sure that tokens which both have, have the same ids; a mask of the draft's own is fine.

    Raises:
        ConfigError: a token has another id in the draft than in the target.
    """
    if draft is None:
        return
    shared = draft.keys() & target.keys()
    wrong = sorted(token for token in shared if draft[token] != target[token])
    if wrong or not shared:
        raise ConfigError(
            f"the draft {path} has another tokenizer than the target: {len(wrong)} of "
            f"{len(shared)} tokens that both have differ in their ids {wrong[:3]}; {NAME} needs a "
            f"draft of the target's own vocabulary"
        )
