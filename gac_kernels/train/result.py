"""What a run comes to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """What a run comes to.

    Attributes:
        accuracy_before: held-out accuracy in [0, 1] where the run proper began, that is after its warm start.
        accuracy_after: held-out accuracy at the end.
        mu: the mixing weight that the last step leaves.
        steps: optimizer steps of the run proper, in all sittings together; the warm start is not counted.
        seconds: wall time of training and evaluation, in all sittings together.
        output: the run's directory.
        notices: what went wrong without an error, in words: no completion ever ended, rewards that were all equal, an
            accuracy that stayed 0.
    """

    accuracy_before: float
    accuracy_after: float
    mu: float
    steps: int
    seconds: float
    output: Path
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the command line prints them."""
        return {**asdict(self), "output": str(self.output), "notices": list(self.notices)}
