"""What goes wrong in a run without an error: said once each, in plain words, with what to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .config import TrainConfig

PATIENCE = 10  # steps in a row; of a run that has no more, all, but for a mere try of one or two
_FEWEST = 3

_EQUAL = (
    "in {count} steps in a row all completions of a prompt got the same reward (mean {reward:g}): every advantage is "
    "0, and the rollouts teach nothing. {advice}"
)
_TOO_HARD = (
    "Try a warm start on demonstrations (warmup_sft_steps), easier problems, or more completions a prompt "
    "(group_size); and see whether a right completion would be rewarded at all"
)
_TOO_EASY = "The problems may be solved already: try harder ones, or a higher temperature"
_NO_END = (
    "in {count} steps in a row no completion ended: all were cut at max_new_tokens={limit}. Raise max_new_tokens; or "
    "see whether the model knows its end token: demonstrations teach it (warmup_sft_steps), and an instruct model "
    "needs its chat template around the prompts"
)
_ACCURACY = (
    "the accuracy on the held-out problems is 0 before and after the run: no completion was right. See whether the "
    "completions end before max_new_tokens and have the form of the answers; try a warm start on demonstrations "
    "(warmup_sft_steps), more steps, or a larger learning_rate"
)


class Watch:
    """Looks at the numbers of every step and at the result.

    Attributes:
        told: kind -> text of all that was said, in this sitting and in those before it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.told: dict[str, str] = {}
        self._seen = 0
        self._in_a_row = {"equal rewards": 0, "no end": 0}

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """What is to be said after a step with these metrics; nothing is said twice."""
        if "groups_mixed" not in metrics:  # no rollouts: warm start, demonstrations alone
            return []
        self._seen += 1
        signs = {"equal rewards": metrics["groups_mixed"] == 0, "no end": metrics["response_ended"] == 0}
        for kind, sign in signs.items():
            self._in_a_row[kind] = self._in_a_row[kind] + 1 if sign else 0
        return self._new(self._steps(metrics["reward"], PATIENCE))

    def finish(self, before: float, after: float, reward: float | None) -> list[str]:
        """What is to be said at the end of the run, all of whose steps may be fewer than make a habit.

        Args:
            before, after: held-out accuracy. reward: of the last step; None: there were no rollouts.
        """
        told = [] if reward is None else self._new(self._steps(reward, max(_FEWEST, min(PATIENCE, self._seen))))
        return told + (self._new(iter([("accuracy", _ACCURACY)])) if before == after == 0.0 else [])

    def state_dict(self) -> dict[str, Any]:
        return {"told": dict(self.told), "seen": self._seen, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.told, self._seen, self._in_a_row = dict(state["told"]), state["seen"], dict(state["in_a_row"])

    def _new(self, notices: Iterator[tuple[str, str]]) -> list[str]:
        new = {kind: text for kind, text in notices if kind not in self.told}
        self.told |= new
        return list(new.values())

    def _steps(self, reward: float, patience: int) -> Iterator[tuple[str, str]]:
        """(kind, text) of what has gone on for so many steps."""
        trains_on_rewards = (self.config.controller, self.config.mu) != ("fixed", 1.0)
        if trains_on_rewards and (count := self._in_a_row["equal rewards"]) >= patience:
            advice = _TOO_EASY if reward > 0.5 else _TOO_HARD
            yield "equal rewards", _EQUAL.format(count=count, reward=reward, advice=advice)
        if (count := self._in_a_row["no end"]) >= patience:
            yield "no end", _NO_END.format(count=count, limit=self.config.max_new_tokens)
