"""Linear layers laid out for the CPU, grouped attention, and rows that are computed alike."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cosched.engines.embedded.attention import grouped_attention
from cosched.engines.embedded.packing import (
    PackedLinear,
    as_at_first,
    layers_of,
    layout_of,
    pack,
    rows_are_alike,
)
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.loop.publish import InPlacePublisher
from cosched.registry import DRAFTERS
from cosched.settings.load import load_config

TARGET = str(Path(__file__).parent.parent / "tinyworld" / "target")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 64 products in another order


def a_layer(half: bool, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias)
    if half:
        layer.weight.data.copy_(layer.weight.half().float())
    return layer.requires_grad_(False)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 33])
def test_a_packed_layer_gives_what_the_plain_one_gives(half: bool, bias: bool, rows: int):
    """Whatever the layout, the product is that of the layer's own weight, in any shape of rows."""
    layer = a_layer(half, bias)
    inputs = torch.randn(2, rows, 64)
    plain = layer(inputs)
    assert pack(layer) == (layout_of(layer.weight, rounds=False) is not None)
    torch.testing.assert_close(layer(inputs), plain, **CLOSE)


def test_half_precision_is_for_weights_that_it_does_not_change():
    """Rounding a target's weights would serve another target; a draft's may be rounded."""
    if torch.backends.quantized.engine not in {"fbgemm", "x86"}:
        pytest.skip("this processor has no FBGEMM")
    assert layout_of(a_layer(half=True).weight, rounds=False) == "half"
    between = a_layer(half=False).weight
    assert layout_of(between, rounds=False) != "half"
    assert layout_of(between, rounds=True) == "half"
    between[0, 0] = 1e6  # beyond half precision: FBGEMM would cut it without a word
    assert layout_of(between, rounds=True) != "half"
    between[0, 0] = float("nan")
    assert layout_of(between, rounds=True) != "half"


def test_a_publication_in_place_is_served_at_once():
    """The layout is a copy: after the weight was written it must not serve the old one."""
    layer, inputs = a_layer(half=True), torch.randn(3, 64)
    pack(layer, rounds=True)
    before = layer(inputs)
    with torch.no_grad():
        layer.weight.copy_(layer.weight * 2)
    torch.testing.assert_close(
        layer(inputs) - layer.bias, 2 * (before - layer.bias), rtol=0.02, atol=0.02
    )  # weights that are rewritten may be rounded to bfloat16


@pytest.mark.parametrize("kind", ["eagle3", "pard"])
def test_the_draft_as_loaded_serves_again_as_it_was_laid_out(kind: str):
    """A rollback to it lays nothing out: weights that are rewritten are laid out in haste, and read more
    slowly. What is published between them, and after, is served for all that."""
    target = Target.load(TARGET, torch.device("cpu"), torch.float32)
    network = next(iter(DRAFTERS.get(kind).examples(target, 3).values())).network()
    network.requires_grad_(False)
    publisher = InPlacePublisher.of_modules(
        network, target.model, as_loaded=partial(as_at_first, network)
    )
    packed = pack(network, rounds=True)
    layers = [one for one in layers_of(network) if isinstance(one, PackedLinear)]
    assert len(layers) == packed > 0
    inputs = [torch.randn(3, one.in_features) for one in layers]

    def products() -> list[torch.Tensor]:
        return [one(rows) for one, rows in zip(layers, inputs, strict=True)]

    loaded, laid_out = products(), [one._product for one in layers]
    other = {name: weight * 2 for name, weight in publisher.weights_of(0).items()}
    for weights, differs in ((other, True), (publisher.weights_of(0), False), (other, True)):
        publisher.publish(weights)
        found = products()
        assert all(torch.equal(*two) != differs for two in zip(found, loaded, strict=True))
        assert [
            a is not b for a, b in zip([x._product for x in layers], laid_out, strict=True)
        ] == ([differs] * packed)


def test_gradients_go_through_the_weight_itself():
    """Training through a packed head (the target's, in a block drafter) loses no gradient."""
    layer, inputs = a_layer(half=True), torch.randn(3, 64, requires_grad=True)
    expected = torch.autograd.grad(layer(inputs).square().sum(), inputs)
    pack(layer)
    assert torch.equal(torch.autograd.grad(layer(inputs).square().sum(), inputs)[0], expected[0])


def test_a_copy_has_a_layout_of_its_own():
    """A trainer's copy of a packed draft must not serve, or be served by, the draft's layout."""
    layer, inputs = a_layer(half=True), torch.randn(3, 64)
    pack(layer, rounds=True)
    before = layer(inputs)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(other(inputs), layer.bias.expand(3, -1))
    assert torch.equal(layer(inputs), before)


def test_only_plain_linear_layers_are_packed():
    """A subclass (a LoRA layer, a quantised one) has a product of its own that must stay."""

    class Own(nn.Linear):
        pass

    both = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    pack(both)
    assert type(both[0]) is Own
    assert isinstance(both[1], PackedLinear) or layout_of(both[1].weight, rounds=False) is None


@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_attention_equals_that_of_repeated_keys(groups: int):
    """Query heads as rows of their key's head: the same products as with keys repeated."""
    torch.manual_seed(0)
    query = torch.randn(2, 2 * groups, 5, 16)
    key, value = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    mask = (torch.arange(40) <= torch.arange(30, 35)[:, None]).expand(2, 1, -1, -1)
    found, _ = grouped_attention(nn.Identity(), query, key, value, mask, scaling=0.3)
    repeated = (x.repeat_interleave(groups, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_a_model_without_a_mask_is_causal():
    """The model's own forward over a whole text gives no mask: later tokens must not be seen."""
    model = Target.load(TARGET, torch.device("cpu"), torch.float32).model
    ids = torch.arange(20)[None]
    other = ids.clone()
    other[0, -1] = 7
    with torch.no_grad():
        logits = [model(input_ids=one, use_cache=False).logits[0, :-1] for one in (ids, other)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_rows", [2, 5, 6, 7, 8])
def test_exact_rows_are_computed_alike(num_rows: int):
    """With ``engine.exact`` a token's row is the same to the bit alone and amid a verification.

    Seven rows in half precision are four and three to FBGEMM, which differ in their last digits.
    """
    target = Target.load(TARGET, torch.device("cpu"), torch.float32)
    pack(target.model, alike=True)
    if not rows_are_alike(target.model, num_rows):
        pytest.skip("this processor computes rows in different ways, and engine.exact is refused")
    torch.manual_seed(0)
    prompt, drafted = torch.randint(5, 2000, (1, 57)), torch.randint(5, 2000, (1, num_rows))
    together = LiveRows(target, 1, 80, (), exact_rows=num_rows)
    alone = LiveRows(target, 1, 80, (), exact_rows=num_rows)
    for rows in (together, alone):
        target.forward(prompt, torch.arange(57)[None], rows._cache, round_to=64)
    verified = together.verify(drafted, torch.arange(57, 57 + num_rows)[None])
    for place in range(num_rows):
        at = torch.tensor([[57 + place]])
        row = alone.verify(drafted[:, place : place + 1], at)
        assert row.logits_BTV.shape[1] == 1
        assert torch.equal(row.logits_BTV[0, 0], verified.logits_BTV[0, place])


def test_rows_that_differ_are_found():
    """What refuses ``engine.exact`` sees a single row whose last digit is another's."""

    class Uneven(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            product = super().forward(input)
            product[-1, 0] += product[-1, 0].abs() * 1e-6
            return product

    even = nn.Sequential(nn.Linear(8, 4))
    pack(even, alike=True)
    assert rows_are_alike(even, 1)
    assert not rows_are_alike(nn.Sequential(Uneven(8, 4)), 3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.pack=false", "engine.exact: true needs packed weights"),
        ("engine.max_batch=2", "got engine.max_batch = 2; use 1"),
    ],
)
def test_exact_is_refused_where_it_cannot_be_kept(override: str, said: str):
    """A promise to the bit that is silently not kept is worse than none."""
    config = Path(TARGET).parent.parent / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError, match=said):
        load_config(config, ["engine.exact=true", override])


def test_a_head_that_is_the_embedding_is_packed_too():
    """PARD's tied head took 21 of a proposal's 24 ms on the real model: it was no linear layer."""
    target = Target.load(TARGET, torch.device("cpu"), torch.float32)
    drafter = next(
        one
        for one in DRAFTERS.get("pard").examples(target, 3).values()
        if one.network().lm_head is None
    )
    network = drafter.network().requires_grad_(False)
    states = torch.randn(3, network.config.hidden_size)
    plain = network.head(states)
    pack(network, rounds=True)
    assert "tied_head" not in dict(network.named_modules())
    assert isinstance(network.tied_head, PackedLinear) or layout_of(states, rounds=True) is None
    torch.testing.assert_close(network.head(states), plain, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        network.model.embed_tokens.weight.zero_()  # a publication
    assert not network.head(states).any()
    copied = copy.deepcopy(network)
    assert copied.tied_head.weight is copied.model.embed_tokens.weight
