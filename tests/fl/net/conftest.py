"""A test PKI for each module."""

import pytest

from shardpar.fl.net.keys import make_test_keys
from tests.fl.net.parties import PARTIES


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pki") / "keys"
    make_test_keys(directory, PARTIES)
    return directory
