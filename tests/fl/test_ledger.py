"""The ledger: composed against closed forms and published figures, through crashes and damage."""

import math
import subprocess
import sys

import pytest
from scipy import optimize, stats

from shardpar.errors import CheckpointError, ConfigError, RunError, SpecError
from shardpar.fl.ledger import Budget, Ledger, Release, epsilon_of, noise_multiplier_for

DP_SGD = Release(1.1, 256 / 60_000, 60 * 60_000 // 256)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Balle and Wang's exact profile of the Gaussian mechanism (ICML 2018)."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        return stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b) - delta

    return optimize.brentq(excess, 0, 100)


def test_the_published_regression_vector_holds():
    assert epsilon_of([DP_SGD], 1e-5, "rdp") == pytest.approx(2.597, abs=1e-3)
    assert epsilon_of([DP_SGD], 1e-5) == pytest.approx(2.382, abs=1e-3)
    needed = noise_multiplier_for(
        Budget(2.0, 1e-5), DP_SGD.count, lambda z: Release(z, 256 / 60_000)
    )
    assert needed == pytest.approx(1.2242, abs=3e-4)


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (2.0, 9), (10.0, 100)])
def test_full_rounds_compose_as_one_gaussian(noise, count):
    got = epsilon_of([Release(noise)] * count, 1e-5)
    assert got == pytest.approx(gaussian_epsilon(noise / math.sqrt(count), 1e-5), rel=2e-3)


def naive(releases, delta):
    """Broken: every round on its own, the largest said to be all."""
    return max(epsilon_of([release], delta) for release in releases)


def composes(accountant) -> bool:
    """Whether what is promised for many rounds covers what can be told from them together."""
    releases = [Release(1.0)] * 16
    return accountant(releases, 1e-5) >= 0.999 * gaussian_epsilon(1.0 / 4, 1e-5)


def test_rounds_without_composition_are_caught():
    assert composes(epsilon_of)
    assert not composes(naive)


def test_a_fixed_batch_has_no_amplification_to_claim():
    assert epsilon_of([Release(1.0, 0.01)], 1e-5) < epsilon_of([Release(1.0)], 1e-5) / 5
    with pytest.raises(SpecError, match=r"rate 0 must be in \(0, 1\]"):
        Release(1.0, 0)


def test_extras_are_paid():
    plain = epsilon_of([Release(1.0, count=4)], 1e-5)
    extra = Release(1.0, count=4, extra_epsilon=0.01, extra_delta=1e-6)
    assert epsilon_of([extra], 1e-5) > plain + 0.04
    with pytest.raises(SpecError, match="take δ"):
        epsilon_of([Release(1.0, extra_delta=1e-5)], 1e-5)


def test_training_stops_at_the_budget_and_restarts_keep_what_is_spent(tmp_path):
    path, budget, round_ = tmp_path / "ledger", Budget(4.0, 1e-5), Release(3.0)
    done = 0
    while True:
        with Ledger(path, budget) as ledger:  # as if restarted after every round
            assert len(ledger.releases) == done
            if not ledger.allows(round_):
                break
            spent = ledger.append(round_, f"round {done}")
            done += 1
            assert spent == pytest.approx(gaussian_epsilon(3.0 / math.sqrt(done), 1e-5), rel=5e-3)
            assert ledger.remaining() == pytest.approx(4.0 - spent)
    assert done == max(n for n in range(1, 50) if gaussian_epsilon(3.0 / math.sqrt(n), 1e-5) <= 4.0)
    with Ledger(path, budget) as ledger, pytest.raises(RunError, match=r"past 4 .* stop training"):
        ledger.append(round_, "one more")
    with Ledger(path, budget) as ledger:
        assert len(ledger.releases) == done


def test_a_crash_at_any_byte_of_a_line_loses_nothing_that_was_promised(tmp_path):
    path, budget = tmp_path / "ledger", Budget(9.0, 1e-5)
    with Ledger(path, budget) as ledger:
        ledger.append(Release(3.0), "kept")
        whole = path.read_bytes()
        ledger.append(Release(3.0), "torn")
    after = path.read_bytes()
    for end in range(len(whole), len(after), 7):
        path.write_bytes(after[:end])
        with Ledger(path, budget) as ledger:
            assert len(ledger.releases) == 1
            ledger.append(Release(4.0))
        with Ledger(path, budget) as ledger:
            assert [r.noise_multiplier for r in ledger.releases] == [3.0, 4.0]


def test_damage_is_told_not_skipped(tmp_path):
    path, budget = tmp_path / "ledger", Budget(9.0, 1e-5)
    with Ledger(path, budget) as ledger:
        for _ in range(3):
            ledger.append(Release(3.0))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [
        lines[1].replace(b"3.0", b"9.0"),  # another value
        b"",  # a line taken out
        lines[2] + lines[1],  # two in another order
        b"\xff\n",
        b"[]\n",
    ]
    for line in damaged:
        path.write_bytes(b"".join([lines[0], line, *lines[2:]]))
        with pytest.raises(CheckpointError, match="line 2 is damaged"):
            Ledger(path, budget)


def test_another_budget_is_refused(tmp_path):
    Ledger(tmp_path / "ledger", Budget(1.0, 1e-5)).close()
    with pytest.raises(CheckpointError, match="was begun with"):
        Ledger(tmp_path / "ledger", Budget(2.0, 1e-5))
    with pytest.raises(ConfigError, match="must be positive"):
        Budget(0.0, 1e-5)


def test_one_process_holds_it(tmp_path):
    path = tmp_path / "ledger"
    program = (
        "import sys; from shardpar.fl.ledger import *; from pathlib import Path\n"
        "Ledger(Path(sys.argv[1]), Budget(1.0, 1e-5))"
    )
    with Ledger(path, Budget(1.0, 1e-5)):
        other = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
        )
    assert other.returncode == 1
    assert "is held by another process" in other.stderr


def test_a_line_is_on_disk_before_append_returns(tmp_path, monkeypatch):
    from shardpar.fl import ledger as module

    path, order = tmp_path / "ledger", []
    with Ledger(path, Budget(9.0, 1e-5)) as ledger:
        sync = module.os.fsync
        monkeypatch.setattr(
            module.os, "fsync", lambda f: (order.append(path.read_bytes().count(b"\n")), sync(f))
        )
        ledger.append(Release(3.0))
        order.append("returned")
    assert order == [2, "returned"]


def test_a_budget_too_small_says_so():
    with pytest.raises(ConfigError, match="use fewer rounds"):
        noise_multiplier_for(Budget(0.1, 1e-5), 10, lambda z: Release(z, extra_epsilon=0.01))
