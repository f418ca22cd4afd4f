"""What the controllers of several ranks compare before they exchange anything whose size depends on it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.distributed as dist

from . import controller_schema as schema
from .config import ControllerConfig
from .controller_state import named, numbers_of
from .distributed import all_gather_text, ranks_disagree

# A rank's header: whether it refused its arguments, step, configuration's checksum, whether it begins (was made or has
# loaded a state since it last compared), and the state that it begins with, zeros if it does not.
HEADER = 4 + schema.STATE_NUMBERS


def compare_controllers(
    headers: Sequence[Sequence[int]], config: ControllerConfig, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """The same ValueError on every rank, naming what differs. Every rank must call, with all ranks' headers."""
    if refused := [rank for rank, header in enumerate(headers) if header[0]]:
        raise ranks_disagree(f"step() raised on ranks {refused} of the group, whose own error says why")
    tags = [list(header[1:3]) for header in headers]
    if any(tag != tags[0] for tag in tags):
        text = ""
        if any(tag[1] != tags[0][1] for tag in tags):
            text = f"; {_different_fields(config, group, device)}"
        raise ranks_disagree(f"controllers of all ranks must agree in (step, configuration), got by rank {tags}{text}")
    begins = [bool(header[3]) for header in headers]
    if any(begins) and not all(begins):
        which = [rank for rank, one in enumerate(begins) if one]
        raise ranks_disagree(
            f"controllers of all ranks must begin together: those of ranks {which} were made or have loaded a state "
            "since the last exchange, the others were not"
        )
    states = [list(header[4:HEADER]) for header in headers]
    if any(state != states[0] for state in states):
        values = [named(numbers_of(state)) for state in states]
        names = [name for name in values[0] if any(one[name] != values[0][name] for one in values)]
        differing = {name: [one[name] for one in values] for name in names}
        raise ranks_disagree(f"controllers of all ranks must hold the same state, got by rank {differing or states}")


def _different_fields(config: ControllerConfig, group: dist.ProcessGroup | None, device: torch.device) -> str:
    configs = [json.loads(text) for text in all_gather_text(json.dumps(config.as_dict()), group, device)]
    names = sorted({name for one in configs for name in one if any(c.get(name) != one[name] for c in configs)})
    return ", ".join(f"{name} by rank: {[one.get(name) for one in configs]}" for name in names)
