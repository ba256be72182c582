"""LoRA: low-rank adapters on the draft's linear layers, which PEFT injects and DeepSpeed steps on.

A layer ``y = W x`` becomes ``y = W x + (alpha / r) B A x``; W stays, A ``[r, in]`` and B ``[out, r]``
learn (LoRA, arXiv 2106.09685). B begins at zero, so the draft begins as it was loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.loop.roles import Trainer
    from cosched.protocols import Drafter
    from cosched.records import Decision, SignalBatch, UpdateResult

ADAPTER = "default"  # PEFT's name of the one adapter that it injects


@dataclass(frozen=True, slots=True)
class Lora:
    """Which linear layers get an adapter, of which rank, and ``alpha / rank``, its scale."""

    layers: tuple[str, ...]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def merged(self) -> tuple[str, ...]:
        """Parameters of the network that an adapter changes where it is merged into them."""
        return tuple(f"{layer}.weight" for layer in self.layers)

    def num_parameters(self, network: nn.Module) -> int:
        """Elements of A and B of all layers: r (in + out) of each."""
        layers = [cast("nn.Linear", network.get_submodule(layer)) for layer in self.layers]
        return sum(self.rank * (one.in_features + one.out_features) for one in layers)

    def inject(self, network: nn.Module, seed: int) -> tuple[str, ...]:
        """Put adapters into a network, which keeps its parameters; returns what may be trained.

        The same seed gives the same adapters, and no other random draw is disturbed.
        """
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  typed int, only divided
            target_modules="|".join(map(re.escape, self.layers)),
        )
        device = next(network.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, network)
        return tuple(name for name, p in network.named_parameters() if p.requires_grad)


def on_base_of(drafter: Drafter, base: Drafter) -> Drafter:
    """The drafter, its weights now those of ``base``: the same storage, as long as neither trains."""
    network, shared = drafter.network(), base.network()
    assert network is not None
    assert shared is not None
    for own, other in zip(network.parameters(), shared.parameters(), strict=True):
        own.data = other.data
    return drafter


def weight_names(layer: str) -> tuple[str, str]:
    """How PEFT names A and B of a layer among the network's parameters."""
    return f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight"


def placed(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a draft under the names that they have in a network with adapters, B being zero.

    What they make of it says what the draft says: merged weights, or those of adapters themselves.
    """
    own = dict(network.named_parameters())
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in own:
            found[name] = weight
            continue
        layer, _, part = name.rpartition(".")
        found[f"{layer}.base_layer.{part}"] = weight
        up = weight_names(layer)[1]
        found[up] = torch.zeros_like(own[up])
    return found


def find_layers(network: nn.Module, targets: Sequence[str] | None) -> tuple[str, ...]:
    """The linear layers that the targets name: whole names, or their ends; None is all of them.

    Raises:
        ConfigError: a target names none, or there is none.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    known = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in linear))
    if not linear:
        raise ConfigError("adapt.scope.kind: 'lora' needs linear layers, this draft has none")
    if targets is None:
        return tuple(linear)
    for target in targets:
        if not any(_names(target, layer) for layer in linear):
            raise ConfigError(
                f"adapt.scope.targets: {target!r} names no linear layer of this draft, which has "
                f"{known}"
            )
    return tuple(layer for layer in linear if any(_names(target, layer) for target in targets))


def _names(target: str, layer: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


class MergingTrainer:
    """A trainer of adapters whose candidate is the network's own weights, adapters merged in.

    What serves then needs no adapters: W + (alpha / r) B A, computed anew from W each time, so that
    nothing drifts. ``load`` takes such weights for a new W and begins the adapters anew, since a sum
    cannot be taken apart; ``reset`` goes back to the first W.
    """

    def __init__(self, trainer: Trainer, network: nn.Module, lora: Lora) -> None:
        self.trainer = trainer
        self._layers: dict[str, Any] = {
            f"{layer}.weight": network.get_submodule(layer) for layer in lora.layers
        }
        self._first: dict[str, Tensor] | None = None  # every W as it was before the first ``load``

    @property
    def busy(self) -> bool:
        return self.trainer.busy

    def update(self, batch: SignalBatch, decision: Decision) -> UpdateResult | None:
        return self.trainer.update(batch, decision)

    def finished(self) -> UpdateResult | None:
        return self.trainer.finished()

    @torch.no_grad()
    def weights(self) -> Mapping[str, Tensor]:
        """Merged weights, by the names that they have without adapters."""
        return {name: _merged(layer) for name, layer in self._layers.items()}

    def reset(self) -> None:
        if self._first is not None:
            self._set_base(self._first)
            self._first = None
        self.trainer.reset()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._keep_first()
        self._set_base(weights)
        self.trainer.reset()

    def state(self) -> Mapping[str, Tensor]:
        tensors = dict(self.trainer.state())
        if self._first is not None:
            tensors |= {f"base.{name}": base.clone() for name, base in self._base().items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.reset()
        base = {name: tensors[f"base.{name}"] for name in self._layers if f"base.{name}" in tensors}
        if base:
            self._keep_first()
            self._set_base(base)
        self.trainer.restore(tensors)

    def _base(self) -> dict[str, Tensor]:
        return {name: layer.get_base_layer().weight for name, layer in self._layers.items()}

    def _keep_first(self) -> None:
        if self._first is None:
            self._first = {name: base.detach().clone() for name, base in self._base().items()}

    @torch.no_grad()
    def _set_base(self, weights: Mapping[str, Tensor]) -> None:
        for name, base in self._base().items():
            base.copy_(weights[name])


def _merged(layer: Any) -> Tensor:
    """W plus its adapter; where B is zero W itself, since adding a zero would turn -0 into 0."""
    base: Tensor = layer.get_base_layer().weight.detach()
    says_something = layer.lora_B[ADAPTER].weight.any()  # on the device, so that nobody waits
    return torch.where(says_something, base + layer.get_delta_weight(ADAPTER), base)
