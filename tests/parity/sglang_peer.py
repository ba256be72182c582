"""SGLang's drafts: its classes, its loaders, its arithmetic; attention and its pool are ours.

A running engine keeps keys in a paged pool and takes the newest from one of many kernels. Here a
layer keeps its keys in a list and attends with one product; window and causality are read off the
layer, as a kernel does.

Letters: R texts, N anchors, K drafted tokens, V vocabulary, Q rows of a forward, L rows kept.
"""

from __future__ import annotations

import socket
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sglang.srt import runtime_context
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.dflash import DFlashDraftModel
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
from sglang.srt.server_args import ServerArgs
from sglang.test.layer_ut_utils import init_single_process_dist
from torch import Tensor
from transformers import AutoConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.engines.embedded.target import Target
    from cosched.records import SignalBatch


@cache
def start(target_folder: Path) -> None:
    """What its layers look up in the process: server arguments and groups of one process."""
    args = ServerArgs(
        model_path=str(target_folder),
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        skip_tokenizer_init=True,
    )
    runtime_context.publish(args, role="scheduler")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_single_process_dist(port)
    initialize_dp_attention(args)
    RadixAttention.forward = _attend


def load_eagle3(folder: Path) -> Any:
    return _load(LlamaForCausalLMEagle3, folder)


def load_dflash(folder: Path) -> Any:
    return _load(DFlashDraftModel, folder)


def _load(model_class: Any, folder: Path) -> Any:
    model = model_class(AutoConfig.from_pretrained(folder)).eval()
    model.load_weights(load_file(folder / "model.safetensors").items())
    return model


class _Batch(SimpleNamespace):
    """Of its ForwardBatch what the models ask for, and keys and values by layer."""

    def __init__(self, features: Tensor | None = None) -> None:
        super().__init__(
            mm_input_embeds=None,
            forward_mode=ForwardMode.EXTEND,
            contains_mm_inputs=lambda: False,
            spec_info=SimpleNamespace(hidden_states=features),
            keys={},
            values={},
        )

    def keep(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows ``[Q, H * D]``; all rows ``[L, H, D]`` of the layer."""
        for store, rows in ((self.keys, keys), (self.values, values)):
            rows = rows.reshape(-1, layer.tp_k_head_num, layer.head_dim)
            store.setdefault(layer.layer_id, []).append(rows)
        return torch.cat(self.keys[layer.layer_id]), torch.cat(self.values[layer.layer_id])


def _attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: _Batch, **_: Any) -> Tensor:
    keys_LHD, values_LHD = batch.keep(layer, k, v)
    queries_QJD = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
    num_rows, num_kept = len(queries_QJD), len(keys_LHD)
    at_Q = torch.arange(num_kept - num_rows, num_kept)[:, None]
    at_L = torch.arange(num_kept)
    visible_QL = torch.ones(num_rows, num_kept, dtype=torch.bool)
    if layer.attn_type is AttentionType.DECODER:
        visible_QL &= at_L <= at_Q
    if layer.sliding_window_size > -1:  # how many rows before its own a row sees
        visible_QL &= at_L >= at_Q - layer.sliding_window_size
    attended_JQD = F.scaled_dot_product_attention(
        queries_QJD.transpose(0, 1)[None],
        keys_LHD.transpose(0, 1)[None],
        values_LHD.transpose(0, 1)[None],
        attn_mask=visible_QL,
        scale=layer.scaling,
        enable_gqa=True,
    )[0]
    return attended_JQD.transpose(0, 1).flatten(1)


def _at_anchors(batch: SignalBatch, logits: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """``[R, N, K, V]`` of ``logits(tokens_C1, features_CF, anchor)``, one text and anchor a call."""
    texts = zip(batch.tokens_RC1, batch.features_RCF, strict=True)
    anchors = batch.anchors_RN[0].tolist()
    return torch.stack([torch.stack([logits(*text, at) for at in anchors]) for text in texts])


@torch.no_grad()
def eagle3_logits(model: Any, batch: SignalBatch, steps: int, target: Target) -> Tensor:
    """``[R, N, K, V]`` in serving order: the rows up to an anchor, then one row a step."""
    model.load_weights([("embed_tokens.weight", target.embedding.weight)])  # its worker shares it
    own = model.lm_head.weight[: model.config.draft_vocab_size]
    head = target.head.weight if model.load_lm_head_from_target else own
    return _at_anchors(batch, partial(_chain, model, head, steps))


def _chain(
    model: Any, head: Tensor, steps: int, tokens_C1: Tensor, features_CF: Tensor, anchor: int
) -> Tensor:
    batch = _Batch(features_CF[:anchor])
    tokens, at, logits = tokens_C1[1 : anchor + 1], torch.arange(anchor), []
    for step in range(steps):
        normed, (state,) = model.model(tokens, at, batch)
        logits.append(F.linear(normed[-1], head))
        batch.forward_mode = ForwardMode.DECODE
        batch.spec_info.hidden_states = state[-1:]
        tokens, at = tokens_C1[anchor + 1 + step][None], at[-1:] + 1
    return torch.stack(logits)


@torch.no_grad()
def dflash_logits(model: Any, batch: SignalBatch, target: Target, mask: int) -> Tensor:
    """``[R, N, K, V]``: the context's keys from its features, then one block behind each anchor."""
    return _at_anchors(batch, partial(_block, model, target, mask))


def _block(
    model: Any, target: Target, mask: int, tokens_C1: Tensor, features_CF: Tensor, anchor: int
) -> Tensor:
    batch, at = _Batch(), torch.arange(anchor)
    context = model.project_target_hidden(features_CF[:anchor])
    for layer in model.layers:
        attention = layer.self_attn
        keys, values = attention.kv_proj_only(context)
        keys = attention.apply_k_rope(at, attention.apply_k_norm(keys))
        batch.keep(attention.attn, keys, values)
    block = torch.full((model.block_size,), mask)
    block[0] = tokens_C1[anchor]
    at = anchor + torch.arange(model.block_size)
    hidden = model(block, at, batch, input_embeds=target.embedding(block)).hidden_states
    return target.head(hidden[1:])
