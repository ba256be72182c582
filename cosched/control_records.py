"""Records of numbers and words only, so that a policy or a report can be read, replayed and tested without torch.

They cross a stage of the round as those with tensors do, and are taken from ``cosched.records`` with them.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Snapshot(msgspec.Struct, frozen=True):
    """Everything a policy may know. Counters run from the start of the arm.

    ``seconds_updating`` and ``seconds_publishing`` are those that the engine waited for. The mean
    behind ``reference_acceptance_length`` is slow (5,000 rounds), that behind the recent one fast (20).
    ``acceptance_shortfall`` is how many tokens a request has lost against the reference since
    acceptance began to fall. ``last_update_seconds`` is what the newest update has cost since it began,
    publication included; ``serving_seconds_since_update`` what drafting and verifying took since then.
    ``micro_step_seconds`` is 0 until it has been measured. ``update_gain`` is the acceptance length
    after an update over the one before it, a geometric moving mean that starts at 1; where a guard
    scores candidates it is theirs over the serving draft's, on the same rows. ``seconds_earned`` is
    what drafting and verifying would have taken longer with the draft as loaded, by the guard's mean
    difference less its standard error. ``expected_tokens_left`` is per running request.
    ``tokens_since_loaded`` were committed since the draft was last as it was loaded. ``trials`` are the
    newest comparisons of objectives, the oldest first: what one update with each of them, from the same
    weights, would have brought over the serving draft, in tokens; ``num_trials`` counts all there were.
    ``serves_loaded`` says whether what serves is the draft as it was loaded; for ``pause_rounds`` more
    the guard, which has just undone a publication, would have nothing trained.
    """

    round_index: int
    num_running: int
    num_committed: int
    num_drafted: int
    num_accepted: int
    recent_acceptance_length: float
    rounds_since_update: int
    tokens_since_update: int
    num_updates: int
    draft_version: int
    buffered_tokens: int
    seconds_drafting: float
    seconds_verifying: float
    seconds_updating: float
    seconds_publishing: float
    recent_round_seconds: float = 0.0
    reference_acceptance_length: float = 0.0
    acceptance_shortfall: float = 0.0
    last_update_seconds: float = 0.0
    serving_seconds_since_update: float = 0.0
    micro_step_seconds: float = 0.0
    update_gain: float = 1.0
    expected_tokens_left: float = 0.0
    num_queued: int = 0
    seconds_earned: float = 0.0
    num_finished: int = 0
    requests_since_update: int = 0
    tokens_since_loaded: int = 0
    updates_since_trial: int = 0
    num_trials: int = 0
    trials: tuple[tuple[float, ...], ...] = ()
    serves_loaded: bool = True
    pause_rounds: int = 0
    lead_tokens: float = 0.0  # as the guard's Standing has it


class Standing(msgspec.Struct, frozen=True):
    """What a guard knows, in numbers, for the next ``Snapshot``.

    ``lead_tokens`` is by how much what was learnt is known to be better than the draft as loaded on text
    like this, in tokens a round: the mean difference less its standard error, and never less than 0.
    ``resumes_at`` is the round until which the guard would have nothing trained.
    """

    lead_tokens: float = 0.0
    resumes_at: int = 0


class Decision(msgspec.Struct, frozen=True):
    """Train now, or not. ``learning_rate`` None keeps the trainer's own.

    The rest says what with: the loss of which of the objectives (0 where there is but one), what
    share of the learning rate, and whether all objectives are tried and the best of them is kept.
    """

    num_steps: int
    learning_rate: float | None = None
    reason: str = ""
    objective: int = 0
    rate_share: float = 1.0
    trial: bool = False


NOTHING = Decision(num_steps=0)  # not now


class Choice(msgspec.Struct, frozen=True):
    """Which objective the next update takes, and whether it tries all of them instead."""

    objective: int = 0
    trial: bool = False


class UpdateResult(msgspec.Struct, frozen=True):
    """What the trainer did: micro-steps taken, steps skipped as non-finite, loss of each step.

    ``lost_mass`` is the share of the teacher's mass outside of the draft's vocabulary, estimated on
    some rows of the batch (``BatchLoss``; of this rank's share, where there are several); None where
    the vocabularies are one. After a trial ``objective`` is the one whose update was kept, and
    ``trial`` what each brought: the score of its candidate above that of the serving draft, in tokens.
    """

    num_steps: int
    num_skipped: int
    losses: tuple[float, ...]
    num_rows: int
    seconds: float
    lost_mass: float | None = None
    objective: int = 0
    trial: tuple[float, ...] = ()


Action = Literal["keep", "publish", "roll_back", "wait"]


class Verdict(msgspec.Struct, frozen=True):
    """What is to become of the candidate and of what serves: one action, and why.

    ``keep``       what serves stays, and no candidate is looked at; without a reason nothing was
    ``wait``       what serves stays, and the candidate is trained on until more is known of it
    ``publish``    the candidate serves
    ``roll_back``  training starts again from version ``to``, with an empty optimizer; that version
                   serves again, if it does not already

    Scores are mean acceptance lengths, expected on ``num_rows`` held-out rows; None where nothing
    was scored.
    """

    action: Action
    reason: str = ""
    to: int | None = None
    num_rows: int | None = None
    candidate_score: float | None = None
    serving_score: float | None = None
    loaded_score: float | None = None


KEEP = Verdict("keep")  # there was nothing to look at


class WeightVersion(msgspec.Struct, frozen=True):
    """The serving draft after a publication: its number and checksums in hexadecimal.

    That of the target is of the slice which was looked at; None where none was.
    """

    version: int
    draft_checksum: str
    target_checksum: str | None
    seconds: float


class RoundRow(msgspec.Struct, frozen=True):
    """One request in one round, for the reports: where it stood and what was committed.

    ``position`` counts generated tokens: 0 is the first token of the answer.
    """

    request_id: str
    position: int
    draft_version: int
    num_drafted: int
    num_accepted: int
    num_committed: int
