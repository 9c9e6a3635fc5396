"""Errors that a user can mend: each carries the exit code of the command line.

A message states the fact, its numbers and the next step. Anything else that escapes is a bug.
"""


class P2BWError(Exception):
    """What p2bw refuses, with a reason and a cure; the base of all of its errors."""

    exit_code = 1


class UsageError(P2BWError):
    """The command line or a call asks for something that makes no sense."""

    exit_code = 2


class ModelError(P2BWError):
    """The user's model file could not be loaded, built or traced."""

    exit_code = 3


class InfeasibleError(P2BWError):
    """No plan fits; the message says which limit binds and by how much."""

    exit_code = 4


class TimeLimitError(P2BWError):
    """The time limit passed before any plan was found."""

    exit_code = 5


class InputFileError(P2BWError):
    """A file that is data (plan, problem, topology, profile) is not valid."""

    exit_code = 6


class MismatchError(P2BWError):
    """Plan, stage code, checkpoint or ranks do not belong together, or a file is corrupt."""

    exit_code = 7


class ResourceError(P2BWError):
    """Out of memory or disk."""

    exit_code = 8


class PeerError(P2BWError):
    """Another rank died or hangs, and with it the run, which can be resumed."""

    exit_code = 75


class StoppedError(P2BWError):
    """A signal stopped the run, which can be resumed."""

    exit_code = 75
