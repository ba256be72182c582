"""The simulation behind `cosched plan`: what must hold whatever the costs are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cosched.plan.behaviour import Acceptance, given
from cosched.plan.simulate import SIMULATED, Scene, simulate

LENGTHS = np.array([40, 200, 200, 900])
BEHAVIOUR = given(2.0, 3.0, 50.0, 4, LENGTHS)
SIDECAR = Scene(
    servers=1, requests=4, seconds=20.0, round_seconds=0.01, prefill=0.004, cadence=16, update=0.05,
    handover=1e-4, publish=0.001, intake=2e-4, link_in=1e9, link_out=1e9, round_bytes=600, row_bytes=4096,
    prompt_rows=64, version_bytes=1e6,
)  # fmt: skip
FREE = replace(
    SIDECAR,
    prefill=0.0,
    update=0.0,
    handover=0.0,
    publish=0.0,
    intake=0.0,
    link_in=np.inf,
    link_out=np.inf,
)
SCENES = [
    SIDECAR,
    FREE,
    replace(SIDECAR, servers=300),  # taking in and training are both full
    replace(SIDECAR, servers=8, intake=0.0, link_in=1e6),  # the link is
    replace(SIDECAR, servers=2, update=30.0),  # no update ends
]


@pytest.mark.parametrize("scene", SCENES)
def test_rows_that_were_sent_are_taken_dropped_or_waiting(scene: Scene) -> None:
    """No row is lost count of, whichever of link, intake and queue is full."""
    found = simulate(scene, BEHAVIOUR, seed=1)
    assert found.sent == pytest.approx(found.taken + found.dropped + found.waiting, rel=1e-9)
    assert found.sent >= found.committed > 0


def test_a_trainer_that_costs_nothing_drops_nothing_and_is_never_behind() -> None:
    """Every round is taken in where it is sent, and every update is made that the cadence asks for."""
    found = simulate(replace(FREE, servers=200), BEHAVIOUR, seed=1)
    assert found.dropped == found.waiting == found.busy == 0
    assert found.taken == pytest.approx(found.sent)
    assert found.updates == pytest.approx(found.rounds / FREE.cadence, rel=0.01)
    assert found.exposed == 0


def test_without_costs_the_speed_is_length_times_batch_over_seconds() -> None:
    """Tokens a second of a server: its requests, each of which commits the acceptance length every round."""
    found = simulate(FREE, BEHAVIOUR, seed=1)
    speed = found.tau * FREE.requests / FREE.round_seconds
    assert found.committed / found.seconds == pytest.approx(speed, rel=1e-9)
    assert 2.0 < found.tau < found.late_tau <= 3.05  # it has learnt, 125 updates a second


def test_what_a_server_waits_for_slows_it_by_as_much() -> None:
    """In its own process: an update every N rounds that costs e makes a round longer by e / N."""
    own = replace(FREE, elsewhere=False, exposed=0.08, seconds=60.0)
    found = simulate(own, BEHAVIOUR, seed=1)
    expected = 1 / (own.round_seconds + own.exposed / own.cadence)
    assert found.rounds / found.seconds == pytest.approx(expected, rel=0.01)
    share = own.exposed / own.cadence * expected
    assert found.exposed / found.serving == pytest.approx(share, rel=0.02)


def test_more_servers_send_no_fewer_bytes_and_one_trainer_is_the_same_one() -> None:
    """Bytes to the trainer rise until something is full and do not fall then; what it does has a most."""
    numbers = (1, 2, 4, 16, 64, 256, 1024)
    flat = given(2.0, 2.0, 50.0, 4, LENGTHS)  # a draft that gets better sends more rows a round
    found = [simulate(replace(SIDECAR, servers=n), flat, seed=1) for n in numbers]
    rates = [one.bytes_in / one.seconds for one in found]
    assert all(b >= 0.99 * a for a, b in itertools.pairwise(rates))
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.05)
    for one in found:
        assert one.updates <= 1 + one.seconds / SIDECAR.update
        assert one.taken / one.seconds * SIDECAR.row_bytes <= SIDECAR.link_in * 1.001
        assert one.bytes_out <= SIDECAR.link_out * one.seconds + 1024 * SIDECAR.version_bytes
    assert found[0].dropped == 0 < found[-1].dropped
    assert found[-1].updates == pytest.approx(found[-1].seconds / SIDECAR.update, rel=0.02)


def test_servers_that_stand_for_several_do_as_those_would() -> None:
    """Beyond some number servers are alike: each that is simulated counts for more than one."""
    quiet = replace(FREE, seconds=5.0)
    some = simulate(replace(quiet, servers=SIMULATED), BEHAVIOUR, seed=1)
    more = simulate(replace(quiet, servers=4 * SIMULATED), BEHAVIOUR, seed=1)
    assert more.rounds == pytest.approx(4 * some.rounds)
    assert more.updates == pytest.approx(4 * some.updates, rel=0.01)
    assert more.bytes_in == pytest.approx(4 * some.bytes_in, rel=0.02)


def test_versions_that_the_link_cannot_carry_are_passed_over() -> None:
    """Weights of 16 servers take a second, updates 50 ms: versions come a second apart, and no more."""
    slow = replace(SIDECAR, servers=16, version_bytes=1e6, link_out=16e6)
    found = simulate(slow, BEHAVIOUR, seed=1)
    assert found.updates > 300
    assert found.versions == pytest.approx(found.seconds, abs=2)


def test_what_one_request_taught_is_forgotten_with_it() -> None:
    """State per request: the gain of a request begins anew, so that short answers never come to all of it."""
    own = replace(FREE, elsewhere=False, requests=1)
    assert simulate(replace(own, per_request=True), BEHAVIOUR, seed=1).late_tau < 2.4
    assert simulate(own, BEHAVIOUR, seed=1).late_tau > 2.6


def test_nothing_is_learnt_without_a_cadence_and_chance_repeats() -> None:
    """The control has no update, no hand-over and no bytes; the same seed is the same course."""
    control = simulate(replace(SIDECAR, cadence=0.0), BEHAVIOUR, seed=1)
    assert control.updates == control.sent == control.exposed == control.bytes_in == 0
    assert control.tau == pytest.approx(2.0, abs=0.03)
    again, other = (simulate(SIDECAR, BEHAVIOUR, seed) for seed in (1, 2))
    assert again == simulate(SIDECAR, BEHAVIOUR, 1) != other


@pytest.mark.parametrize("tau", [1.0, 1.3, 2.5, 3.9, 4.0])
def test_rounds_commit_their_acceptance_length_on_the_mean(tau: float) -> None:
    """200,000 rounds of at most 4 tokens: five standard errors are 0.017 at most."""
    drawn = Acceptance(4).draw(np.full(200_000, tau), np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(tau, abs=0.017)
    assert drawn.min() >= 1
    assert drawn.max() <= 4
