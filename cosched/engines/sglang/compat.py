"""Every SGLang name that the backend uses, where each version has it; resolved when first used.

The CPU support has a table of its own (``cpu/compat.py``). Where versions differ, the function that
bridges it stands in one of the two, behind the table.

Versions: all tests run with 0.5.23. With 0.5.20 and 0.5.21 ``make versions`` looks up every name
below and runs the three families on a CPU.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

_PATHS: dict[str, str] = {
    "AdaptiveController": "sglang.srt.speculative.adaptive_runtime_state:AdaptiveController",
    "AuthLevel": "sglang.srt.utils.auth:AuthLevel",
    "CaptureHiddenMode": "sglang.srt.model_executor.forward_batch_info:CaptureHiddenMode",
    "ConfigArgumentMerger": "sglang.srt.utils.server_args_config_parser:ConfigArgumentMerger",
    "CustomSpecAlgo": "sglang.srt.speculative.spec_registry:CustomSpecAlgo",
    "DFlashWorkerV2": "sglang.srt.speculative.dflash_worker_v2:DFlashWorkerV2",
    "DecodeCudaGraphRunner": "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner",
    "EAGLEWorkerV2": "sglang.srt.speculative.eagle_worker_v2:EAGLEWorkerV2",
    "EagleDraftExtendInput": "sglang.srt.speculative.eagle_info:EagleDraftExtendInput",
    "EagleDraftInput": "sglang.srt.speculative.eagle_info:EagleDraftInput",
    "Engine": "sglang.srt.entrypoints.engine:Engine",
    "ForwardBatch": "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    "ForwardMode": "sglang.srt.model_executor.forward_batch_info:ForwardMode",
    "GenerationBatchResult": "sglang.srt.managers.utils:GenerationBatchResult",
    "HEALTH_CHECK_RID_PREFIX": "sglang.srt.constants:HEALTH_CHECK_RID_PREFIX",
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    "LogitsProcessor": "sglang.srt.layers.logits_processor:LogitsProcessor",
    "MergedColumnParallelLinear": "sglang.srt.layers.linear:MergedColumnParallelLinear",
    "QKVParallelLinear": "sglang.srt.layers.linear:QKVParallelLinear",
    "RowParallelLinear": "sglang.srt.layers.linear:RowParallelLinear",
    "ServerArgs": "sglang.srt.server_args:ServerArgs",
    "SpeculativeAlgorithm": "sglang.srt.speculative.spec_info:SpeculativeAlgorithm",
    "StandaloneDraftWorker": "sglang.srt.speculative.standalone_worker_v2:StandaloneDraftWorker",
    "StandaloneWorkerV2": "sglang.srt.speculative.standalone_worker_v2:StandaloneWorkerV2",
    "VocabParallelEmbedding": "sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding",
    "auth_level": "sglang.srt.utils.auth:auth_level",
    "build_eagle_verify_input": "sglang.srt.speculative.eagle_worker_common:build_eagle_verify_input",
    "get_config": "sglang.srt.utils.hf_transformers_utils:get_config",
    "get_observability": "sglang.srt.runtime_context:get_observability",
    "get_parallel": "sglang.srt.runtime_context:get_parallel",
    "get_serving": "sglang.srt.runtime_context:get_serving",
    "get_spec": "sglang.srt.runtime_context:get_spec",
    "get_tp_group": "sglang.srt.distributed:get_tp_group",
    "http_app": "sglang.srt.entrypoints.http_server:app",
    "kill_process_tree": "sglang.srt.utils:kill_process_tree",
    "load_plugins": "sglang.srt.plugins:load_plugins",
    "make_draft_block_spec_info": "sglang.srt.speculative.draft_worker_common:make_draft_block_spec_info",
    "prefill_tail_tokens": "sglang.srt.speculative.eagle_utils:_eagle_prefill_tail_tokens",
    "prepare_server_args": "sglang.srt.server_args:prepare_server_args",
    "run_server": "sglang.launch_server:run_server",
}

# Targets of hooks
INTERNAL_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
LAUNCH = "sglang.srt.entrypoints.engine.Engine._launch_subprocesses"
REQUEST_CHECK = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
PREPARE_LAUNCH = "sglang.srt.entrypoints.engine._set_envs_and_config"
SCHEDULER_COUNTS = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._resolve_spec_v2_tokens"
)
SCHEDULER_END = "sglang.srt.managers.scheduler.Scheduler.handle_shutdown"
SCHEDULER_NEXT = "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run"
SCHEDULER_IDLE = "sglang.srt.managers.scheduler.Scheduler.on_idle"

EAGLE_LOG = "sglang.srt.speculative.eagle_worker_v2"


def resolve(path: str) -> Any:
    """What ``module`` or ``module:attribute`` names."""
    module, _, attribute = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def plan_rows(batch: Any, runner: Any) -> None:
    """Tell SGLang which rows of the cache a batch writes that was made by hand.

    0.5.23 takes them from a plan wherever a pool counts its rows in a way of its own, as a draft's
    does that lives in the target's. 0.5.20 and 0.5.21 have neither such a draft nor a plan.
    """
    bind = getattr(runner.kv_index_translator, "bind_own_plan", None)
    if bind is not None:
        bind(batch)


def capture_passes(runner: Any, runner_class: Callable[[], type]) -> None:
    """Let a draft's runner capture its passes with that class, which is not asked for where it cannot.

    It cannot on a CPU, or without CUDA graphs: it goes on without.
    """
    runner._decode_cuda_graph_runner_cls = runner_class
    runner.init_decode_cuda_graph()


def quiet_switches() -> None:
    """Leave one line of SGLang's out of its log: there is one for every change of the draft's length.

    It logs them for a policy of its own, which changes it rarely.
    """
    logging.getLogger(EAGLE_LOG).addFilter(_is_no_switch)


def _is_no_switch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Switch adaptive runtime state")


def says_paths() -> bool:
    """Whether a verification says which rows of its trees it accepted: from 0.5.21 on."""
    return hasattr(resolve(_PATHS["GenerationBatchResult"]), "accept_index")


def gone(request_ids: set[str], plan: Any, scheduler: Any) -> set[str]:
    """Which of these requests a scheduler has no more, when it has planned its next batch.

    It has those that run, those of the batch, the one whose prompt is run in pieces, and those that
    wait (retracted ones among them). The plan's running batch is not yet the scheduler's own.
    """
    batches = [batch.reqs for batch in (plan.running_batch, plan.batch_to_run) if batch is not None]
    pieces = [scheduler.chunked_req] if scheduler.chunked_req is not None else []
    missing = request_ids - {request.rid for group in (*batches, pieces) for request in group}
    if not missing:  # nearly always: a long queue is not gone through in every round
        return missing
    return missing - {request.rid for request in scheduler.waiting_queue}


def is_health_check(request: Any) -> bool:
    """Whether SGLang asks itself whether it answers (``/health``, ``/health_generate``)."""
    return request.rid.startswith(resolve(_PATHS["HEALTH_CHECK_RID_PREFIX"]))


def answer_of(request: Any) -> list[int]:
    """The tokens that a client gets of a request so far: not what its last round committed beyond its end."""
    return list(request.output_ids_through_stop)


def replica(replicas: int) -> int:
    """Which of a server's data-parallel replicas this process is of.

    Raises:
        ConfigError: this version does not tell.
    """
    if replicas == 1:
        return 0
    number = getattr(resolve(_PATHS["get_parallel"])(), "dp_rank", None)
    if number is None:
        raise ConfigError(
            f"--dp-size: this SGLang does not tell a worker which of {replicas} replicas it is of; 0.5.23 does"
        )
    return number


def has_pictures(request: Any) -> bool:
    """Whether a prompt has pictures or sound in it: hashes beyond the vocabulary stand for their tokens."""
    return getattr(request, "multimodal_inputs", None) is not None


def __getattr__(name: str) -> Any:
    if name not in _PATHS:
        raise AttributeError(name)
    value = resolve(_PATHS[name])
    globals()[name] = value
    return value
