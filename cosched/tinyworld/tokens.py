"""The tokenizer, and the corpus as flat token arrays on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cosched.tinyworld.corpus import Corpus, Document, Split

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"  # what the block and parallel drafters put where a token is yet unknown
TOKENIZER_CHARACTERS = 2_000_000  # per domain: enough for 2048 merges

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def train_tokenizer(corpus: Corpus, directory: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE over an equal share of each domain, saved in Hugging Face format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus, TOKENIZER_CHARACTERS), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(directory)
    return fast


def _sample(corpus: Corpus, characters: int) -> Iterator[str]:
    for documents in corpus.values():
        texts = [document.text for document in documents if document.split == "train"]
        stride = max(1, sum(map(len, texts)) // characters)
        yield from texts[::stride]


@dataclass(frozen=True, slots=True)
class TokenStore:
    """Token ids of every document of one domain and split, end to end.

    ``ids`` is a uint16 array ``[num_tokens]``; document ``i`` is ``ids[starts[i]:starts[i + 1]]``
    and ends with the end-of-text token.
    """

    ids: np.ndarray
    starts: np.ndarray

    def crops(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """``count`` random crops, int64 ``[count, length]``, that may cross documents."""
        begin = torch.randint(len(self.ids) - length, (count,), generator=generator)
        return torch.stack(
            [torch.from_numpy(self.ids[b : b + length].astype(np.int64)) for b in begin.tolist()]
        )


def tokenize_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> dict[str, int]:
    """Write ``DOMAIN.SPLIT.npz`` files; returns the number of tokens of each."""
    directory.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for domain, documents in corpus.items():
        by_split: dict[Split, list[Document]] = {"train": [], "heldout": []}
        for document in documents:
            by_split[document.split].append(document)
        for split, members in by_split.items():
            encoded = tokenizer([d.text for d in members], add_special_tokens=False)["input_ids"]
            pieces = [np.array([*ids, tokenizer.eos_token_id], np.uint16) for ids in encoded]
            starts = np.cumsum([0, *(len(piece) for piece in pieces)])
            np.savez(directory / f"{domain}.{split}.npz", ids=np.concatenate(pieces), starts=starts)
            counts[f"{domain}.{split}"] = int(starts[-1])
    return counts


def load_tokens(directory: Path, domain: str, split: Split) -> TokenStore:
    """Read what ``tokenize_corpus`` wrote."""
    with np.load(directory / f"{domain}.{split}.npz") as stored:
        return TokenStore(stored["ids"], stored["starts"])
