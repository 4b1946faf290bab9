"""Every error shardpar raises on purpose.

    ShardparError
    ├── UserError              the input is wrong; the command line exits with 2
    │   ├── ConfigError        a config file or an override
    │   ├── SpecError          a layout, mesh, cluster or graph that cannot be
    │   │   └── PlanError      a plan that contradicts its graph or its cluster
    │   │       └── InfeasibleError   nothing fits in memory; says by how much
    │   ├── CaptureError       a model that cannot be captured
    │   ├── TargetError        machines that nothing here can compile for
    │   └── DataError          data that is missing or malformed
    └── RunError               the run failed; the command line exits with 1
        ├── CheckpointError    a checkpoint is damaged or missing
        └── PartyError         another party of a federation did not answer, or broke the protocol

Each message says what is wrong, where, what was got, and what to write instead.
"""

from __future__ import annotations


class ShardparError(Exception):
    """Base of all of them: `except shardpar.ShardparError` catches nothing else."""

    exit_code = 1


class UserError(ShardparError):
    """What the user wrote is wrong; nothing has been started or lost."""

    exit_code = 2


class ConfigError(UserError):
    """A config file or override names an unknown key, or gives it a wrong value."""


class SpecError(UserError):
    """A layout, mesh, cluster or graph breaks one of its own rules."""


class PlanError(SpecError):
    """A plan contradicts the layer graph or the cluster it is meant for."""


class TargetError(UserError):
    """There is no compiler for the machines a plan is to be verified on, or it failed."""


class InfeasibleError(PlanError):
    """No plan fits in memory.

    Attributes:
      missing_bytes: how many bytes per device the best candidate is over its limit.
      suggestion: what would make it fit, in words.
    """

    def __init__(self, message: str, *, missing_bytes: int, suggestion: str) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes
        self.suggestion = suggestion


class CaptureError(UserError):
    """A model or its loss cannot be turned into a layer graph."""


class DataError(UserError):
    """Training data is missing, unreadable, or too small for what was asked."""


class RunError(ShardparError):
    """The run could not go on, through no fault of its input."""


class CheckpointError(RunError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""


class PartyError(RunError):
    """Another party of a federation did not answer, or sent what the protocol does not allow.

    Attributes:
      party: which one.
    """

    def __init__(self, message: str, *, party: str) -> None:
        super().__init__(message)
        self.party = party
