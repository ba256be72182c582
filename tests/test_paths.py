"""The path that a verification took through each tree."""

from __future__ import annotations

import random

import torch

from cosched.engines.sglang.worker.collector import RoundCollector, Verified
from cosched.engines.sglang.worker.paths import NONE, accepted_paths
from tests.helpers.verified import prompt


def tree(draw: random.Random, num_rows: int, depth: int) -> list[int]:
    """Parents, level by level; row 0 is the root."""
    parents, depths = [NONE], [0]
    while len(parents) < num_rows:
        open_ = [row for row, at in enumerate(depths) if at < depth and row >= (parents[-1])]
        parents.append(draw.choice(open_))
        depths.append(depths[parents[-1]] + 1)
    return parents


def first_child(parents: list[int], row: int) -> int:
    return parents.index(row) if row in parents else NONE


def test_a_path_is_what_was_accepted_and_the_first_choices_behind_it() -> None:
    """In a hundred random batches, against a walk of each tree by hand; rows are those of all trees."""
    draw = random.Random(0)
    for _ in range(100):
        num_rows, depth = draw.randint(2, 9), draw.randint(1, 4)
        depth_rows = depth + 1
        trees = [tree(draw, num_rows, depth) for _ in range(draw.randint(1, 4))]
        accepted = torch.full((len(trees), depth_rows), NONE)
        expected: list[list[int]] = []
        for number, parents in enumerate(trees):
            path = [0]
            while (
                there := [r for r, p in enumerate(parents) if p == path[-1]]
            ) and draw.random() < 0.6:
                path.append(draw.choice(there))
            first = number * num_rows
            accepted[number, : len(path)] = torch.tensor(path) + first
            while (child := first_child(parents, path[-1])) != NONE:
                path.append(child)
            expected.append([row + first for row in path])
        children = torch.tensor([[first_child(p, r) for r in range(num_rows)] for p in trees])
        paths = accepted_paths(accepted, children)
        assert paths.lengths() == [len(path) - 1 for path in expected]
        for rows, path in zip(paths.rows_BS.tolist(), expected, strict=True):
            assert rows == path + [path[-1]] * (depth_rows - len(path))


def test_a_path_that_ends_early_is_a_shorter_block() -> None:
    """Of two requests in one round: nobody learns from rows that are behind the end of a tree."""
    rows: list[int] = []
    collector = RoundCollector(lambda row: rows.append(row.num_drafted))
    collector.prefilled((prompt("a", 0, 5, 5), prompt("b", 0, 9, 9)))
    list(collector.before_counts())
    collector.verified(
        Verified(
            iteration=0,
            request_ids=("a", "b"),
            version=0,
            tokens_BS=torch.tensor([[5, 6, 7, 7], [9, 10, 11, 12]]),
            decided_BS=torch.tensor([[6, 8, 0, 0], [10, 11, 12, 13]]),
            features_BSF=None,
            teacher_BSX=torch.arange(16.0).view(2, 4, 2),
            seconds=lambda: (0.0, 0.0),
            lengths=lambda: [2, 3],
        )
    )
    (round_,) = collector.counted([1, 3])
    short, long = round_.blocks
    assert (short.path_K.tolist(), short.num_accepted) == ([6, 7], 1)
    assert (long.path_K.tolist(), long.num_accepted) == ([10, 11, 12], 3)
    assert short.teacher_KX is not None
    assert long.teacher_KX is not None
    assert (len(short.teacher_KX), len(long.teacher_KX)) == (2, 3)
    assert [segment.tokens_R1.tolist() for segment in round_.segments] == [
        [5, 6, 8],
        [9, 10, 11, 12, 13],
    ]
    assert rows == [2, 3]
