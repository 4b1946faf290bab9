"""Whatever bytes come, an intersection answers with `PartyError` or goes on."""

import os
import random

import pytest

from shardpar.errors import PartyError
from shardpar.fl.channel import local_channels
from shardpar.fl.he.pool import Pool
from shardpar.fl.messages import decode, encode
from shardpar.fl.psi import _checked_tags
from shardpar.fl.psi_blinding import Blinding, checked_points
from shardpar.fl.psi_messages import BlindedIds, Closing, CommonIds, Opening, TwiceBlindedIds
from shardpar.fl.psi_ring import _Walker
from shardpar.fl.psi_session import PsiSession
from tests.fl.test_secagg_wire import mutated

MUTANTS = 500_000 if "SHARDPAR_LONG" in os.environ else 50_000


@pytest.fixture(scope="module")
def readers():
    """A message of each kind, and what reads it."""
    session = PsiSession("job", ("a", "b", "c"), most_ids=100)
    blinding = Blinding(session.dst, Pool(1))
    points = b"".join(blinding.blinded([b"1", b"2", b"3"]))
    end = local_channels(session.parties)["a"]
    walker = _Walker(end, session, dict.fromkeys("abc", 3), Pool(1), None, None)

    def multiplied(message):
        blinding.multiplied(checked_points(message.points, 3, party="b"), party="b")

    return [
        (Opening(session.digest, 3), lambda m: session.opened("b", m)),
        (BlindedIds(points), multiplied),
        (TwiceBlindedIds(points[:48]), lambda m: _checked_tags(m.tags, 3, party="b")),
        (CommonIds(2, bytes(8)), lambda m: walker._checked(m, "b", 0, 2, party="b")),
        (Closing(session.digest), lambda m: m.common),
    ]


def test_mutants_are_refused_or_read(readers):
    draw, understood, blamed = random.Random(0), 0, set()
    for at in range(MUTANTS):
        message, read = readers[at % len(readers)]
        try:
            changed = decode(mutated(encode(message), draw), type(message), party="b")
            understood += 1
            read(changed)
        except PartyError as error:
            blamed.add(error.party)
    assert blamed == {"b"}
    assert understood > MUTANTS // 100
