"""The target that SGLang serves, as drafters know a target.

Letters: V vocabulary, H hidden width.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cosched.engines.sglang import compat
from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ServedTarget:
    """A ``TargetInfo`` over SGLang's target model.

    Embedding and head are the served parameters themselves where one rank has them whole; where
    ranks share them, a copy is put together once, so that each rank can train on rows of its own.
    """

    def __init__(self, runner: Any, tokenizer: Any) -> None:
        config, model = runner.model_config, runner.model
        self.model: nn.Module = model
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.max_length: int = config.context_len
        self.model_type: str = getattr(config.hf_config, "model_type", "")
        embedding, head = model.get_embed_and_head()
        self.embedding = nn.Embedding.from_pretrained(self._whole(embedding), freeze=True)
        weight = self.embedding.weight if head is embedding else self._whole(head)
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self.head: nn.Module = linear
        self._tokenizer = tokenizer

    def _whole(self, weight: Tensor) -> Tensor:
        """``[V, H]`` of a table whose rows the ranks share and pad."""
        if not weight.is_floating_point() or weight.shape[-1] != self.hidden_size:
            raise ConfigError(
                f"target.path: its embedding or head is quantised ({weight.dtype}); cosched needs "
                f"them in a floating-point type, to say what the target said"
            )
        group = compat.get_tp_group()
        if group.world_size > 1:
            weight = group.all_gather(weight.detach(), dim=0)
        return weight.detach()[: self.vocab_size]

    def token_ids(self) -> Mapping[str, int] | None:
        return None if self._tokenizer is None else self._tokenizer.get_vocab()

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones too.

        Raises:
            ConfigError: SGLang was started without a tokenizer.
        """
        if self._tokenizer is None:
            raise ConfigError("record.text: there is no tokenizer (--skip-tokenizer-init)")
        return self._tokenizer.decode(tokens)

    def tensors(self) -> dict[str, Tensor]:
        """All that must never change; of each the count of writes is that of the parameter itself."""
        return {name: p.detach() for name, p in self.model.named_parameters()}
