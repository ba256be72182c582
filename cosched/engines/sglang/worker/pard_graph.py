"""PARD's pass as a CUDA graph: SGLang's runner of verifications, which a draft's pass looks like.

SGLang captures the pass of DFLASH's draft with it. A pass of PARD has a fixed number of rows a request
as well, and sees what a chain's verification sees: all before the request's first row, and of its own
rows those before. So the runner, its buffers and its padding to the batches that were captured are
SGLang's; what it does not know is how wide the pass of a STANDALONE draft is, for it has none.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from cosched.engines.sglang import compat


class PardGraphRunner(compat.DecodeCudaGraphRunner):
    """Captures the pass for each size of batch, and replays it."""

    def get_spec_info(self, num_tokens: int) -> Any:
        """What attention is told of a pass, as a round tells it (``PardDraftWorker``)."""
        del num_tokens
        return compat.make_draft_block_spec_info(
            draft_token_num=self.captured_req_width, device=self.device
        )
