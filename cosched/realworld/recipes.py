"""What the drafts of the real model are: one of each family, small enough to pay on a CPU.

Letters: U words of a reduced vocabulary, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cosched.realworld.recorded import FEATURE_LAYERS, LAST_HIDDEN
from cosched.tinyworld.drafts import layer_of
from drafters.dflash import DFlashConfig, DFlashDrafter
from drafters.eagle3 import Eagle3Config, Eagle3Drafter
from drafters.pard import PardConfig, PardDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cosched.engines.embedded.target import Target
    from cosched.realworld.recorded import Recorded
    from drafters.layers import DecoderStack

AnyDrafter = Eagle3Drafter | DFlashDrafter | PardDrafter

MASK = 16  # SmolLM2's <empty_output>, which no chat has
NUM_WORDS = 8_192  # of EAGLE-3's head: 94.5 % of the tokens of other answers; 12,288 are 95.4 %
NUM_FREQUENT = 8_192  # of those that a student with the target's head is trained to tell apart
NUM_OTHERS = 2_048  # and as many of the rest, others in every step
CHAIN = 4  # tokens that EAGLE-3 drafts
BLOCK = 7  # that DFlash and PARD do: a block of DFlash has the anchor as well

# The target's layers whose outputs they see: the first, the middle and a late one; all that is kept;
# late ones and the last hidden state.
EAGLE3_LAYERS = (FEATURE_LAYERS[0], FEATURE_LAYERS[2], FEATURE_LAYERS[4])
DFLASH_LAYERS = FEATURE_LAYERS
PARD_LAYERS = (FEATURE_LAYERS[2], FEATURE_LAYERS[4], LAST_HIDDEN)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a draft is made, on what it is trained, and how what was trained becomes the draft.

    ``begin(target, classroom, words)`` gives the student, ``num_draft_tokens`` behind each of
    ``anchors`` places of ``batch`` answers teach it in a step (what of an answer is computed for all
    anchors alike is most for PARD), ``finish(student, target)`` gives the draft. One that
    ``borrows_head`` learns over the words of the classroom, others over their own of the target.
    """

    begin: Callable[[Target, Classroom, Tensor], AnyDrafter]
    finish: Callable[[Any, Target], AnyDrafter]
    layers: tuple[int, ...]
    num_draft_tokens: int
    batch: int
    anchors: int
    position_decay: float
    steps: int
    borrows_head: bool


class Classroom:
    """The target as it is while students are trained that borrow its head: with fewer words.

    Softmax over 49,152 words would be most of the work. The frequent words are there in every step;
    of all others some, drawn anew by ``call``, so that a student learns to leave those alone.
    """

    def __init__(self, target: Target, words_V: Tensor, num_frequent: int, num_others: int) -> None:
        self._target = target
        self._frequent_U, self._others = words_V[:num_frequent], words_V[num_frequent:]
        self._num_others = min(num_others, len(self._others))
        self.hidden_size, self.num_layers = target.hidden_size, target.num_layers
        self.max_length, self.embedding = target.max_length, target.embedding
        self.model_type = target.model_type
        self.vocab_size = len(self._frequent_U) + self._num_others
        head = nn.Linear(self.hidden_size, self.vocab_size, bias=False).requires_grad_(False)
        head.weight[: len(self._frequent_U)] = self._rows(self._frequent_U)
        self._weight, self.head = head.weight, cast("nn.Module", head)

    def token_ids(self) -> Mapping[str, int] | None:
        return self._target.token_ids()

    def call(self, generator: torch.Generator) -> None:
        """Other words for the next step."""
        drawn = torch.randperm(len(self._others), generator=generator)[: self._num_others]
        self._weight[len(self._frequent_U) :] = self._rows(self._others[drawn])

    def _rows(self, ids: Tensor) -> Tensor:
        return next(self._target.head.parameters())[ids]


def words_by_frequency(answers: Sequence[Recorded], vocab_size: int) -> Tensor:
    """All target tokens ``[V]``, the most frequent of the answers first.

    What no answer has comes in the order of its id, which in a byte-pair vocabulary is about that of
    frequency in general.
    """
    count_V = torch.zeros(vocab_size, dtype=torch.int64)
    for answer in answers:
        count_V += torch.bincount(answer.tokens_T[answer.num_prompt :], minlength=vocab_size)
    return count_V.argsort(descending=True, stable=True)


def _begin_eagle3(target: Target, _classroom: Classroom, words_V: Tensor) -> Eagle3Drafter:
    """The target's last layer, on its last features, and the target's head rows, which stay.

    To a random layer with a head that learns, that is what 200 steps are worth (held-out acceptance
    length 1.435 against 1.385); and a head of the target's own rows need not be stored.
    """
    words_U = words_V[:NUM_WORDS].sort().values
    config = Eagle3Config(
        **_layer(target, "llama"),
        draft_vocab_size=len(words_U),
        feature_layers=list(EAGLE3_LAYERS),
    )
    network = Eagle3Drafter.initialise(config, target, 1).network()
    assert network.lm_head is not None
    assert network.d2t is not None
    assert network.t2d is not None
    decoder = target.model.get_decoder()
    ours, theirs, width = network.midlayer, decoder.layers[-1], target.hidden_size
    with torch.no_grad():
        network.d2t.copy_(words_U - torch.arange(len(words_U)))
        network.t2d.zero_()[words_U] = True
        network.lm_head.weight.copy_(next(target.head.parameters())[words_U])
        network.lm_head.requires_grad_(False)
        network.norm.weight.copy_(decoder.norm.weight)
        ours.hidden_norm.weight.copy_(theirs.input_layernorm.weight)
        for name in ("q_proj", "k_proj", "v_proj"):  # behind the embedding, which is new to them
            own = getattr(ours.self_attn, name).weight
            own[:, width:] = getattr(theirs.self_attn, name).weight
    _pass_on_late_features(network.fc, EAGLE3_LAYERS)
    for name in ("self_attn.o_proj", "post_attention_layernorm", "mlp"):
        ours.get_submodule(name).load_state_dict(theirs.get_submodule(name).state_dict())
    return Eagle3Drafter(network, target, CHAIN)


def _begin_dflash(target: Target, classroom: Classroom, _words: Tensor) -> DFlashDrafter:
    """The target's last three layers over the features of five, for the anchor and seven masks.

    They save some 100 of the steps that random layers take.
    """
    config = DFlashConfig(
        **_layer(target, "qwen3"),
        num_hidden_layers=3,
        num_target_layers=target.num_layers,
        feature_layers=list(DFLASH_LAYERS),
        block_size=BLOCK + 1,
        mask_token_id=MASK,
    )
    drafter = DFlashDrafter.initialise(config, classroom, BLOCK)
    network, decoder = drafter.network(), target.model.get_decoder()
    with torch.no_grad():
        network.hidden_norm.weight.copy_(decoder.layers[-1].input_layernorm.weight)
        network.norm.weight.copy_(decoder.norm.weight)
    _pass_on_late_features(network.fc, DFLASH_LAYERS)
    _begin_layers(network.layers, target)
    return drafter


def _finish_dflash(student: DFlashDrafter, target: Target) -> DFlashDrafter:
    return DFlashDrafter(student.network(), target, BLOCK)


def _begin_pard(target: Target, classroom: Classroom, _words: Tensor) -> PardDrafter:
    """The target's own embedding, last three layers and final norm, with its features added (PARD-2).

    They go on from features as the target does: the loss of 25 steps is 5.5 nats in the mean, and 8.4
    where the layers are the target's first.
    """
    # As transformers counts them: 0 is the embedding, i is after layer i - 1.
    layers = [layer if layer == LAST_HIDDEN else layer + 1 for layer in PARD_LAYERS]
    config = PardConfig(
        **_layer(target, "llama"),
        num_hidden_layers=3,
        tie_word_embeddings=True,
        pard_token=MASK,
        pard2=True,
        spd_type="pard2",
        pard2_target_layers=layers,
        pard2_target_dim=len(layers) * target.hidden_size,
    )
    network = PardDrafter.initialise(config, target, 1).network()
    body, decoder = network.model, target.model.get_decoder()
    assert network.target_proj is not None
    _pass_on_late_features(network.target_proj, PARD_LAYERS)
    body.embed_tokens.load_state_dict(decoder.embed_tokens.state_dict())
    body.embed_tokens.requires_grad_(False)
    body.norm.load_state_dict(decoder.norm.state_dict())
    _begin_layers(body.layers, target)
    network.lm_head = cast("nn.Linear", classroom.head)
    return PardDrafter(network, classroom, BLOCK)


def _finish_pard(student: PardDrafter, target: Target) -> PardDrafter:
    network = student.network()
    network.lm_head = None  # as its configuration says: the embedding
    return PardDrafter(network, target, BLOCK)


RECIPES: dict[str, Recipe] = {
    "eagle3": Recipe(
        _begin_eagle3,
        lambda student, _target: student,
        EAGLE3_LAYERS,
        num_draft_tokens=CHAIN,
        batch=8,
        anchors=24,
        position_decay=0.9,
        steps=4_000,
        borrows_head=False,
    ),
    "dflash": Recipe(
        _begin_dflash,
        _finish_dflash,
        DFLASH_LAYERS,
        num_draft_tokens=BLOCK,
        batch=8,
        anchors=12,
        position_decay=0.8,
        steps=3_000,
        borrows_head=True,
    ),
    "pard": Recipe(
        _begin_pard,
        _finish_pard,
        PARD_LAYERS,
        num_draft_tokens=BLOCK,
        batch=4,
        anchors=24,
        position_decay=0.8,
        steps=1_500,
        borrows_head=True,
    ),
}


@torch.no_grad()
def _pass_on_late_features(fuse: nn.Linear, layers: tuple[int, ...]) -> None:
    """Of all features those that the target's last layers are used to go through as they are."""
    width, place = fuse.out_features, layers.index(FEATURE_LAYERS[-1])
    fuse.weight.zero_()[:, place * width : (place + 1) * width] = torch.eye(width)


def _begin_layers(layers: DecoderStack, target: Target) -> None:
    """They begin as the last layers of the target."""
    last = target.model.get_decoder().layers[-len(layers) :]
    for ours, theirs in zip(layers, last, strict=True):
        ours.load_state_dict(theirs.state_dict(), strict=False)  # norms of heads it has not


def _layer(target: Target, model_type: str) -> dict[str, Any]:
    config = target.model.config
    return {
        **layer_of(target),
        "model_type": model_type,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
    }
