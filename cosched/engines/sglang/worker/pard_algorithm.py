"""The algorithm COSCHED_PARD: what the server is told about it, before any worker is there."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import Any

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.as_builtin import adapted_algorithm
from cosched.errors import ConfigError

NAME = "COSCHED_PARD"
NUM_DRAFT_TOKENS = 3  # as SGLang's STANDALONE, and our drafters


def algorithm(builtin: str = "STANDALONE") -> type:
    """The class to register it with: STANDALONE's place, for a draft that has its own weights."""

    class PardAlgorithm(adapted_algorithm(builtin)):
        def handle_server_args(self, server_args: Any) -> None:
            settle_arguments(server_args)
            super().handle_server_args(server_args)

        def resolve_max_speculative_num_draft_tokens(self, server_args: Any) -> int | None:
            num_nodes = super().resolve_max_speculative_num_draft_tokens(server_args)
            return None if num_nodes is None else max(num_nodes, num_rows(num_nodes - 1))

        def supports_target_verify_for_draft(self) -> bool:
            return True  # what the draft's pass is, to a runner of CUDA graphs

        def get_num_tokens_per_req_for_target_verify(
            self, num_draft_tokens: int, is_draft_worker: bool
        ) -> int:
            return num_rows(num_draft_tokens - 1) if is_draft_worker else num_draft_tokens

    return PardAlgorithm


def num_rows(num_drafted: int) -> int:
    """Rows of a request in the draft's pass: at most K + 1 committed tokens, and K - 1 masks."""
    return 2 * num_drafted


def settle_arguments(server_args: Any) -> None:
    """Check what was given, and fill in what follows from it.

    Raises:
        ConfigError: the arguments or the draft are not for PARD.
    """
    path = server_args.speculative_draft_model_path
    if path is None:
        raise ConfigError(f"{NAME} needs --speculative-draft-model-path, the folder of its draft")
    # 0.5.23 has turned the older flag into the number when it asks us; before, there is no number.
    if server_args.enable_dp_attention or getattr(server_args, "attn_dp_size", 1) != 1:
        raise ConfigError(
            f"{NAME} does not go with --attn-dp-size or --enable-dp-attention; leave it out"
        )
    if server_args.speculative_eagle_topk not in {None, 1}:
        raise ConfigError(
            f"--speculative-eagle-topk is {server_args.speculative_eagle_topk}, but {NAME} drafts "
            f"one chain: leave it out, or give 1"
        )
    steps, nodes = server_args.speculative_num_steps, server_args.speculative_num_draft_tokens
    if steps is None:
        steps = NUM_DRAFT_TOKENS if nodes is None else nodes - 1
    if steps < 1 or nodes not in {None, steps + 1}:
        raise ConfigError(
            f"--speculative-num-steps {steps} with --speculative-num-draft-tokens {nodes}: {NAME} "
            f"drafts one token or more a round (steps), and SGLang counts the token before them in "
            f"(draft tokens = steps + 1); give one of the two"
        )
    server_args.speculative_num_steps = steps
    server_args.speculative_eagle_topk = 1
    server_args.speculative_num_draft_tokens = steps + 1
    config = compat.get_config(
        path,
        trust_remote_code=server_args.trust_remote_code,
        revision=server_args.speculative_draft_model_revision,
    )
    mask_token(config, path)


def mask_token(config: Any, path: str) -> int:
    """The id of the draft's mask token.

    Raises:
        ConfigError: the checkpoint is not one of PARD, or is one of PARD-2.
    """
    if getattr(config, "pard2", False) or getattr(config, "spd_type", None) == "pard2":
        raise ConfigError(
            f"the draft {path} is a PARD-2 checkpoint, which adds features of the target to its "
            f"inputs; {NAME} runs PARD checkpoints only. Serve PARD-2 with engine.kind: embedded"
        )
    token = getattr(config, "pard_token", None)
    if token is None:
        raise ConfigError(
            f"the draft {path} has no pard_token in its config.json, so it is no PARD checkpoint; "
            f"a plain language model is drafted with by --speculative-algorithm STANDALONE"
        )
    if not 0 <= token < config.vocab_size:
        raise ConfigError(
            f"the draft {path} has pard_token {token}, which its vocabulary of "
            f"{config.vocab_size} lacks"
        )
    return token
