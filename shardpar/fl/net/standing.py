"""Decides whether there is sense in waiting for a peer, and what to tell people if not: pure."""

from __future__ import annotations

from dataclasses import dataclass

from shardpar.fl.net.limits import Limits


@dataclass
class Standing:
    """How things stand with one peer.

    Attributes:
      name: the peer.
      where: " at host:port" where this party dials it, else empty.
      lost_s: since when there is no connection, by the monotonic clock.
      connected: whether there is one.
      met: whether there ever was one.
      why: why there is none, for people.
      broken: why there will not be one again; None while there may.
    """

    name: str
    where: str
    lost_s: float
    connected: bool = False
    met: bool = False
    why: str = "it has not been heard of"
    broken: str | None = None

    def found(self) -> None:
        """A connection came about."""
        self.connected = self.met = True
        self.broken = None

    def lost(self, now_s: float, why: str) -> None:
        """It ended."""
        self.connected, self.lost_s, self.why = False, now_s, why

    def failed(self, why: str, *, lasting: bool) -> None:
        """None came about; what lasts is believed of a peer only if it was never met."""
        self.why = why
        if lasting and not self.met:
            self.broken = why

    def breaks(self, why: str) -> None:
        """The peer breaks the protocol, or refuses this party for good; the first reason counts."""
        self.why = why
        self.broken = self.broken or why

    def runs_out_s(self, limits: Limits) -> float | None:
        """When patience with an absent peer runs out; None while it is there.

        >>> Standing("b", "", lost_s=5.0).runs_out_s(Limits(join_s=600, patience_s=120))
        605.0
        >>> Standing("b", "", lost_s=5.0, met=True).runs_out_s(Limits(join_s=600, patience_s=120))
        125.0
        """
        if self.connected:
            return None
        return self.lost_s + (limits.patience_s if self.met else limits.join_s)

    def absence(self, now_s: float, limits: Limits) -> str | None:
        """What to tell people of a peer that has been away for longer than is tolerated."""
        until_s = self.runs_out_s(limits)
        if until_s is None or now_s < until_s:
            return None
        return (
            f"{self.name} has been unreachable{self.where} for {now_s - self.lost_s:.0f} s "
            f"({self.why}); see that it runs and that its address and the firewall are right, or "
            f"raise net.{'patience_s' if self.met else 'join_s'}"
        )
