"""Attacks on intersections, each of which finds its mark on a variant that is broken for it.

The attacker is a party that follows the protocol and keeps what it sees, or sends what no honest
party would.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from shardpar.errors import PartyError
from shardpar.fl import psi, psi_blinding
from shardpar.fl.hash_to_curve import PRIME
from shardpar.fl.he.pool import Pool
from shardpar.fl.psi import intersect
from shardpar.fl.psi_blinding import Blinding, rows_of, tags_of
from shardpar.fl.psi_messages import TAG_BYTES, BlindedIds, Closing, Opening, TwiceBlindedIds
from shardpar.fl.psi_session import PsiSession
from tests.fl.intersections import blames, in_threads

SESSION = PsiSession("job", ("attacker", "victim"))
# u-coordinates of points of low order on the curve and on its twist, canonical.
LOW_ORDER = [
    int(u).to_bytes(32, "little")
    for u in (
        0,
        1,
        PRIME - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
]
NOT_CANONICAL = [(int(PRIME) + small).to_bytes(32, "little") for small in (0, 1, 2, 9, 18)]
NOT_CANONICAL += [(2**255 + 9).to_bytes(32, "little"), b"\xff" * 32]


@dataclass(frozen=True)
class Seen:
    """What an attacker has after a run.

    Attributes:
      points: of the victim, in the order in which they came.
      doubled: the tags of those behind both scalars.
      answers: the tags of its own ids, in its own order.
    """

    points: np.ndarray
    doubled: np.ndarray
    answers: np.ndarray


def curious(ids, session=SESSION, change=lambda points: points, answer=lambda tags: tags):
    """A party in few lines, which may change what it sends."""

    def run(end) -> Seen:
        label = session.label
        end.send("victim", f"{label}/opening", Opening(session.digest, len(ids)))
        end.receive("victim", f"{label}/opening", Opening)
        blinding = Blinding(session.dst, Pool(1))
        points = change(b"".join(blinding.blinded(map(str.encode, ids))))
        end.send("victim", f"{label}/blinded", BlindedIds(points))
        theirs = end.receive("victim", f"{label}/blinded", BlindedIds).points
        doubled = answer(tags_of(blinding.multiplied(theirs, party="victim")))
        end.send("victim", f"{label}/twice", TwiceBlindedIds(doubled))
        if not session.learns("attacker"):
            return Seen(rows_of(theirs, 32), rows_of(doubled, TAG_BYTES), np.empty(0))
        answers = end.receive("victim", f"{label}/twice", TwiceBlindedIds).tags
        common = np.intersect1d(rows_of(answers, TAG_BYTES), rows_of(doubled, TAG_BYTES))
        closing = Closing(hashlib.sha256(common.tobytes()).digest())
        end.send("victim", f"{label}/closing", closing)
        return Seen(*(rows_of(d, w) for d, w in ((theirs, 32), (doubled, 16), (answers, 16))))

    return run


def attacked(attacker, ids, session=SESSION):
    """(what the attacker has, what the victim has)."""
    outcomes = in_threads(
        {"attacker": attacker, "victim": lambda e: intersect(e, "attacker", ids, session)},
    )
    return outcomes["attacker"], outcomes["victim"]


def rows_of_the_victim() -> str:
    """The victim has its ids sorted by income, say: a row tells more than that an id is there."""
    ids = [f"id {at}" for at in range(64)]
    seen, _ = attacked(curious(ids), ids)
    place = {tag: at for at, tag in enumerate(seen.doubled.tolist())}
    found = np.array([place[tag] for tag in seen.answers.tolist()])
    steps = np.bincount(np.diff(found) % 64)
    # Of 63 steps by chance 16 or more are alike once in 10^12 runs.
    return "revealed" if steps.max() >= 16 else "hidden"


@pytest.mark.parametrize(
    "broken",
    [np.arange, lambda count: np.arange(count)[::-1], lambda count: np.roll(np.arange(count), 20)],
    ids=["as it stands", "backwards", "rotated"],
)
def test_rows_are_hidden_by_the_shuffle_alone(monkeypatch, broken):
    assert rows_of_the_victim() == "hidden"
    monkeypatch.setattr(psi, "secret_order", broken)
    assert rows_of_the_victim() == "revealed"


def test_orders_are_uniform_over_all_permutations():
    draws = 4800
    orders, counts = np.unique(
        [psi_blinding.secret_order(4) for _ in range(draws)], axis=0, return_counts=True
    )
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-6


_ONCE = psi_blinding.fresh_scalar()


@dataclass(frozen=True)
class ReusingBlinding(Blinding):
    """Broken: the same scalar in every run."""

    _scalar: bytes = _ONCE


def ids_in_two_of_the_victims_sets(second=SESSION) -> int:
    """How many ids that are not the attacker's it finds in both sets of two runs."""
    one, _ = attacked(curious(["x"]), ["u", "v", "w"])
    two, _ = attacked(curious(["x"], second), ["v", "w", "z"], second)
    return np.intersect1d(one.points, two.points).size


def test_a_secret_is_not_used_in_two_runs(monkeypatch):
    assert ids_in_two_of_the_victims_sets() == 0
    monkeypatch.setattr(psi, "Blinding", ReusingBlinding)
    assert ids_in_two_of_the_victims_sets() == 2
    # Even then ids of another run are other points.
    assert ids_in_two_of_the_victims_sets(PsiSession("job", SESSION.parties, run=1)) == 0


def forged_match(point: bytes) -> str:
    """The victim alone learns; the attacker, without any id, wants it to find one in common."""
    session = PsiSession("job", SESSION.parties, learners=("victim",))
    zero = bytes(TAG_BYTES)
    attacker = curious(
        ["x"], session, change=lambda _: point, answer=lambda tags: zero + tags[TAG_BYTES:]
    )
    _, victim = attacked(attacker, ["u", "v"], session)
    if isinstance(victim, PartyError):
        return str(victim)
    return "forged" if len(victim) == 1 else "nothing"


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda p: p.hex()[:8])
def test_points_of_low_order_are_refused(monkeypatch, point):
    assert forged_match(point) == "attacker sent a point of low order in place of an id"
    strict = psi_blinding._multiply

    def lax(job):
        scalar, points = job
        parts = (strict((scalar, points[at : at + 32])) for at in range(0, len(points), 32))
        return b"".join(part or bytes(32) for part in parts)

    monkeypatch.setattr(psi_blinding, "_multiply", lax)
    assert forged_match(point) == "forged"


@pytest.mark.parametrize("point", NOT_CANONICAL, ids=lambda p: p.hex()[:8])
def test_points_that_are_not_canonical_are_refused(monkeypatch, point):
    assert forged_match(point) == "attacker sent a point that is not canonical"


def refusal(count=2, change=lambda points: points, answer=lambda tags: tags) -> str:
    ids = [f"id {at}" for at in range(count)]
    _, victim = attacked(curious(ids, change=change, answer=answer), ["id 0", "other"])
    return blames(victim)


def moved(points: bytes) -> bytes:
    """The first point, and the same plus the point (0, 0) of order 2, which has 1 / u."""
    u = int.from_bytes(points[:32], "little")
    return points[:32] + pow(u, -1, int(PRIME)).to_bytes(32, "little")


def test_counts_and_repetitions_are_checked():
    assert refusal() == "accepted"
    assert refusal(change=lambda p: p[:32] * 2) == "attacker sent an id more than once"
    assert refusal(change=moved) == "attacker sent an id more than once"
    assert refusal(change=lambda p: p[:32]) == "attacker sent 32 bytes for 2 points of 32"
    assert refusal(change=lambda p: p + p) == "attacker sent 128 bytes for 2 points of 32"
    assert refusal(answer=lambda t: t[:16]) == "attacker answered with 16 bytes for 2 ids of 16"
    assert refusal(answer=lambda t: t[:16] * 2) == "attacker sent an id more than once"


def test_parties_that_come_to_other_common_ids_stop():
    def attacker(end):
        send = end.send

        def lie(to, topic, message):
            send(to, topic, Closing(bytes(32)) if isinstance(message, Closing) else message)

        end.send = lie
        return intersect(end, "victim", ["u"], SESSION)

    _, victim = attacked(attacker, ["u"])
    assert str(victim) == "attacker comes to other common ids in psi/job/0"


def one_person_asked_about(session) -> str:
    """A set of one id asks whether that person is among the victim's."""
    seen, victim = attacked(curious(["u"], session), ["u", "v", "w"], session)
    if isinstance(victim, PartyError):
        return "refused"
    return "answered" if set(seen.answers.tolist()) & set(seen.doubled.tolist()) else "nothing"


def test_small_sets_are_refused_where_a_least_size_is_agreed():
    assert one_person_asked_about(SESSION) == "answered"
    session = PsiSession("job", SESSION.parties, least_ids=3)
    assert one_person_asked_about(session) == "refused"


def what_the_other_learns_of_a_one_sided_run() -> set:
    """Everything that reaches the party that is no learner, beyond the other's points."""
    session = PsiSession("job", SESSION.parties, learners=("victim",))
    topics = set()

    def attacker(end):
        receive = end.receive

        def note(sender, topic, kind, timeout_s=None):
            topics.add(kind)
            return receive(sender, topic, kind, timeout_s)

        end.receive = note
        result = intersect(end, "victim", ["u", "v"], session)
        left = {t for (s, r, t), box in end.boxes.items() if r == "attacker" and box.qsize()}
        assert not left
        return result

    seen, victim = attacked(attacker, ["v", "w", "x"], session)
    assert seen is None
    assert victim.tolist() == [0]
    return topics


def test_whoever_is_no_learner_gets_points_and_a_count_only():
    assert what_the_other_learns_of_a_one_sided_run() == {Opening, BlindedIds}
