"""Replay buffer, publication, registry, co-scheduler: the core without a model to serve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosched.errors import PluginError, PublicationError
from cosched.loop.checksum import _folds, checksum, fold_together, read
from cosched.loop.publish import InPlacePublisher
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.protocols import Drafter, Policy
from cosched.records import NOTHING, Decision, Snapshot
from cosched.registry import DRAFTERS, LOSSES, POLICIES, Registry
from cosched.testing.harness import (
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
    make_target,
)
from tests.helpers.drafts import make_drafter
from tests.helpers.paths import QUICKSTART
from tests.helpers.rounds import ROW, numbered_round

# --- replay buffer -------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ROW, max_size=40),
    st.integers(6, 30),
    st.integers(10, 120),
    st.integers(1000, 40_000),
    st.sampled_from(["delayed", "accepted", "refused", "all"]),
)
def test_the_buffer_never_exceeds_its_limits(steps, window, max_tokens, max_bytes, rows) -> None:
    """Tokens and bytes stay below their limits, whatever arrives, and rows stay in step."""
    limits = ReplayLimits(window, 8, 2, max_tokens, max_bytes, 3 * 4, 3 * 4)
    buffer = ReplayBuffer(limits, rows, None)
    ends: dict[int, int] = {}
    for request, count, teacher, finished, gap in steps:
        start = ends.get(request, 0) + (7 if gap else 0)
        ends[request] = start + count
        buffer.collect(numbered_round(request, start, count, teacher, finished))
        if finished:
            ends.pop(request)
        assert buffer.num_tokens <= max_tokens
        assert buffer.num_bytes <= max_bytes
        assert _real_bytes(buffer) <= buffer.num_bytes
        batch = buffer.sample()
        if batch is not None and rows == "delayed":
            _check_rows_are_in_step(batch)


def _real_bytes(buffer: ReplayBuffer) -> int:
    total = 0
    for rows in buffer._requests.values():
        tensors = [rows.tokens, rows.features, rows.teacher]
        total += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        total += sum(block.path_K.nbytes + 2 * 3 * 4 for block in rows.blocks)
    return total


def _check_rows_are_in_step(batch) -> None:
    valid = batch.weights_RNK > 0
    anchors = batch.starts_R[:, None] + batch.anchors_RN
    expected = anchors[..., None] + torch.arange(2)
    assert torch.equal(batch.paths_RNK[valid], (expected + 1)[valid])
    assert torch.equal(batch.teacher_RNKX[..., 0][valid], expected[valid].float())
    for r, length in enumerate(batch.lengths_R.tolist()):
        at = torch.arange(length) + batch.starts_R[r]
        assert torch.equal(batch.features_RCF[r, :length, 0], at.float())


def test_a_request_too_large_for_the_buffer_is_counted() -> None:
    """Nothing is dropped in silence: what cannot be kept is counted."""
    buffer = ReplayBuffer(ReplayLimits(64, 8, 2, 32, 1 << 20, 12, 12), "delayed", None)
    num_evicted = buffer.collect(numbered_round(0, 0, 4, True, False))
    assert (buffer.num_tokens, num_evicted) == (0, 1)


def test_who_finishes_makes_room_for_who_begins() -> None:
    """In one round: nobody has to go for it, and none that has finished is let in again."""
    buffer = ReplayBuffer(ReplayLimits(16, 8, 2, 48, 1 << 20, 12, 12), "delayed", None)
    for request in range(3):
        assert buffer.collect(numbered_round(request, 0, 16, True, False)) == 0
    last, first = numbered_round(1, 16, 4, True, True), numbered_round(3, 0, 16, True, False)
    both = replace(last, segments=last.segments + first.segments)
    assert buffer.collect(both) == 0
    assert buffer.num_tokens == 48
    assert buffer.collect(numbered_round(4, 0, 16, True, True)) == 0


# --- publication ---------------------------------------------------------------------------


def test_publication_changes_the_draft_in_place_and_nothing_else() -> None:
    """New bits under the same storage, version + 1, the checksum of what was asked for."""
    target = make_target()
    network = make_drafter(target).network()
    publisher = InPlacePublisher.of_modules(network, target.model)
    pointers = [p.data_ptr() for p in network.parameters()]
    new = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    version = publisher.publish(new)
    assert version.version == publisher.version == 1
    assert version.draft_checksum == checksum(new) == checksum(dict(network.named_parameters()))
    assert [version.target_checksum] == publisher.slice_checksums
    assert [p.data_ptr() for p in network.parameters()] == pointers


@pytest.mark.slow
def test_the_target_is_the_same_after_100_publications() -> None:
    """Adapting through a hundred publications leaves every bit of the target."""
    target = make_target(seed=7)
    before = target.checksum()
    drafter = make_drafter(target)
    observer = make_coscheduler(target, drafter, every=1, lr=3e-3)
    requests = make_requests(target, count=2, prompt=6, new=130)
    draft_before = checksum(dict(drafter.network().named_parameters()))
    decode(make_engine(target, drafter, requests, observer=observer), requests)
    assert observer.version >= 100
    assert target.checksum() == before
    assert checksum(dict(drafter.network().named_parameters())) != draft_before


def test_a_write_to_the_target_undoes_the_publication() -> None:
    """A target tensor that was written to raises, and the draft is what it was."""
    target = make_target(seed=8)
    network = make_drafter(target).network()
    publisher = InPlacePublisher.of_modules(network, target.model)
    before = checksum(dict(network.named_parameters()))
    with torch.no_grad():
        target.embedding.weight[0, 0] += 1
    with pytest.raises(PublicationError, match="target"):
        publisher.publish({"norm.weight": network.norm.weight + 1})
    assert checksum(dict(network.named_parameters())) == before
    assert publisher.version == 0


def test_a_kept_version_serves_again_to_the_bit() -> None:
    """Rolling back gives the weights of then under a new number; what is not kept is named."""
    target = make_target(seed=10)
    drafter = make_drafter(target)
    observer = make_coscheduler(target, drafter, every=1, lr=3e-3)
    served = {0: checksum(dict(drafter.network().named_parameters()))}

    class Recorder:
        def emit(self, kind: str, **fields: object) -> None:
            if kind == "publication":
                version = fields["version"]
                served[version.version] = version.draft_checksum

    observer.sink = Recorder()
    requests = make_requests(target, count=1, prompt=6, new=12)
    decode(make_engine(target, drafter, requests, observer=observer), requests)
    newest = observer.version
    assert newest >= 3
    assert len(set(served.values())) == len(served)
    for kept in (newest, 0):
        version = observer.roll_back(kept)
        assert served[version] == served[kept]
        assert checksum(dict(drafter.network().named_parameters())) == served[kept]
    assert version == newest + 2
    with pytest.raises(PublicationError, match=f"version 1 is not kept; there are 0, {version}"):
        observer.roll_back(1)


def test_shared_storage_is_refused() -> None:
    """A draft that holds the target's own head would change the target when it is published."""
    target = make_target()
    network = make_drafter(target).network()
    network.lm_head.weight = target.head.weight
    with pytest.raises(PublicationError, match="lm_head"):
        InPlacePublisher.of_modules(network, target.model)


def test_a_foreign_name_or_shape_is_refused() -> None:
    target = make_target()
    publisher = InPlacePublisher.of_modules(make_drafter(target).network(), target.model)
    with pytest.raises(PublicationError, match="nonsense"):
        publisher.publish({"nonsense": torch.zeros(1)})
    with pytest.raises(PublicationError, match=r"norm\.weight"):
        publisher.publish({"norm.weight": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_a_checksum_is_the_same_on_every_device(dtype: torch.dtype) -> None:
    """The host folds rows by its own, faster way, and a trace names the target by the result."""
    bits = torch.randint(-(2**40), 2**40, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    bits = bits.to(torch.float32).view(torch.int32) if dtype == torch.float32 else bits.to(dtype)
    if dtype == torch.bfloat16:
        bits = bits.view(torch.int16)
    for tensor in (bits, bits.transpose(0, 1), bits[:0]):
        folds = torch.hash_tensor(tensor, dim=-1)
        assert _folds(tensor).numpy().tobytes() == folds.numpy().tobytes()


@pytest.mark.parametrize("together", [False, True])
def test_the_checksum_sees_bits_names_and_rows(together: bool) -> None:
    """One flipped bit, another name, another dtype, two rows swapped: each changes it, also where the
    folds of all tensors are summed."""
    base = {"a": torch.randn(4, 6), "b": torch.randn(5)}
    flipped = {**base, "a": base["a"].clone()}
    flipped["a"].view(torch.int32)[2, 3] ^= 1
    swapped = {**base, "a": base["a"][[1, 0, 2, 3]]}
    renamed = {"a": base["a"], "c": base["b"]}
    taken = (lambda t: read(fold_together(t))[0]) if together else checksum
    found = {taken(t) for t in (base, flipped, swapped, renamed, {**base, "b": base["b"].half()})}
    assert len(found) == 5


# --- registry ------------------------------------------------------------------------------


def test_builtin_plugins_are_there_with_a_line_each() -> None:
    found = {p.name for r in (DRAFTERS, LOSSES, POLICIES) for p in r.plugins()}
    assert {"eagle3", "forward_kl", "never", "every_n_rounds"} <= found
    assert all(p.summary for r in (DRAFTERS, LOSSES, POLICIES) for p in r.plugins())


def test_unknown_and_duplicate_names_are_named() -> None:
    with pytest.raises(PluginError, match="forward_kl"):
        LOSSES.get("nonsense")
    registry = Registry("loss", "losses", object)

    @registry.register("one")
    class One:
        """First."""

    assert One.__name__ == "One"  # the decorator returns the class
    with pytest.raises(PluginError, match=r"(?s)One.*Two"):

        @registry.register("one")
        class Two:
            """Second."""


def test_a_class_that_lacks_what_its_role_has_is_named() -> None:
    """A capability is a member with a default, and one forgotten is known before anything runs."""
    registry = Registry("policy", "schedulers", Policy)
    with pytest.raises(
        PluginError, match=r"'alone' .*Alone\) lacks .*needs_scores.*trains; .*Policy"
    ):

        @registry.register("alone")
        class Alone:
            """Has the method and not the members."""

            def decide(self, snapshot: Snapshot) -> Decision:
                return NOTHING

    with pytest.raises(PluginError, match=r"'idle' .*Idle\) lacks decide;"):

        @registry.register("idle")
        class Idle(Policy):
            """Has the members and not the method."""

    with pytest.raises(PluginError, match=r"lacks cache_bytes_per_token, draft_type, move_slot"):

        @Registry("drafter", "drafters", Drafter).register("bare")
        class Bare(Drafter):
            """What has no default is asked for."""


def test_a_shadowing_folder_is_named(tmp_path, monkeypatch) -> None:
    """A stranger's ``losses`` package in front of ours is an error that says which and where."""
    import sys

    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "__init__.py").write_text("")
    kept = {k: v for k, v in sys.modules.items() if k.split(".")[0] == "losses"}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="shadows"):
        Registry("loss", "losses", object).get("forward_kl")
    sys.modules.pop("losses", None)
    sys.modules.update(kept)


def _install_plugin(folder, name: str, source: str) -> None:
    """What pip leaves behind for a package with one policy."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cosched.schedulers]\n{name} = {name}\n")


def test_another_package_brings_a_policy(tmp_path, monkeypatch) -> None:
    """An installed package's entry point is found, its settings are checked like ours."""
    from cosched.errors import ConfigError
    from cosched.settings.load import load_config

    _install_plugin(
        tmp_path,
        "stranger_policy",
        "from cosched.protocols import Policy, PolicySettings\n"
        "from cosched.records import Decision\n"
        "from cosched.registry import POLICIES\n"
        "class StrangerSettings(PolicySettings, frozen=True, kw_only=True):\n"
        "    patience: int = 3\n"
        "@POLICIES.register('stranger')\n"
        "class Stranger(Policy):\n"
        "    'Waits.'\n"
        "    Settings = StrangerSettings\n"
        "    def __init__(self, settings): self.settings = settings\n"
        "    def decide(self, snapshot): return Decision(num_steps=0)\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(POLICIES, "_loaded", False)
    monkeypatch.setattr(POLICIES, "_plugins", dict(POLICIES._plugins))
    config = load_config(
        QUICKSTART,
        ["adapt.policy.kind=stranger", "adapt.policy.patience=5"],
    )
    assert config.policy_settings.patience == 5
    with pytest.raises(ConfigError, match="patience"):
        load_config(
            QUICKSTART,
            ["adapt.policy.kind=stranger", "adapt.policy.patience=long"],
        )


POLICY = (
    "from cosched.protocols import Policy\n"
    "from cosched.registry import POLICIES\n"
    "@POLICIES.register('{name}')\n"
    "class Stranger(Policy):\n"
    "    'Waits.'\n"
    "    def decide(self, snapshot): ...\n"
)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise RuntimeError('no luck')\n", r"broken_policy.*RuntimeError: no luck"),
        ("import nothing_of_that_name\n", r"broken_policy.*nothing_of_that_name"),
        (POLICY.format(name="half") + "1 / 0\n", r"broken_policy.*ZeroDivisionError"),
        (
            POLICY.format(name="half") + POLICY.format(name="never"),
            r"broken_policy.*'never' is registered twice: by schedulers\.never\.Never "
            r"and by broken_policy\.Stranger; rename one",
        ),
    ],
)
def test_a_broken_plugin_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, source: str, says: str
) -> None:
    """One message names the package and what it raised, also the second time it is asked for.

    What it had registered before it broke is gone, and what was there before is untouched.
    """
    monkeypatch.setattr(POLICIES, "_plugins", dict(POLICIES._plugins))
    never = POLICIES.get("never")
    _install_plugin(tmp_path, "broken_policy", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(POLICIES, "_loaded", False)
    for _ in range(2):
        with pytest.raises(PluginError, match=says):
            POLICIES.get("never")
    assert "half" not in POLICIES._plugins
    assert POLICIES._plugins["never"].cls is never
