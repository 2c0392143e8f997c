"""Which task a projector has when an activation checkpoint runs it again.

The second run happens in backward, where the context variables of the forward pass are gone or hold another call's. One object of the
checkpoint lives from the first run to the last: the ``ctx`` of an autograd function that runs its forward again (``use_reentrant=True``,
and the checkpoints of other libraries), or the frame that ``use_reentrant=False`` keeps. Every run has it on its stack. The first run
leaves its routes there, in the order of the calls; later runs read them.
"""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

Route = tuple[Any, Tensor | None]  # the task of all rows, or of each sample; or the task of each row


def route_of(projector: nn.Module, look_up: Callable[[], Route]) -> Route:
    """The route of a call: ``look_up()``, or in a checkpoint's second run that of the same call in its first."""
    around = list(_checkpoints())
    earlier = next((kept.cmoe_routes for kept, again in around if again and hasattr(kept, "cmoe_routes")), None)
    route = look_up() if earlier is None else earlier.read(projector)
    for kept, again in around:
        if not again:
            if not hasattr(kept, "cmoe_routes"):
                kept.cmoe_routes = _Routes()
            kept.cmoe_routes.by_projector.setdefault(projector, []).append(route)
    return route


class _Routes:
    """What projectors were told inside one checkpoint."""

    def __init__(self) -> None:
        self.by_projector: dict[nn.Module, list[Route]] = {}
        self.reads: dict[tuple[nn.Module, int], int] = {}

    def read(self, projector: nn.Module) -> Route:
        # Each backward pass over the graph runs the calls from the first one on.
        place = projector, torch._C._current_graph_task_id()
        turn = self.reads[place] = self.reads.get(place, -1) + 1
        routes = self.by_projector[projector]
        return routes[turn % len(routes)]


def _checkpoints() -> Iterator[tuple[Any, bool]]:
    """The checkpoints around this call, innermost first: an object that each keeps, and whether this is a second run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, kept = frame.f_code, None
        if code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals["ctx"]
            kept = ctx if isinstance(ctx, FunctionCtx) else None
        elif code.co_filename == checkpoint.__file__ and code.co_name == "unpack_hook":
            kept = frame.f_locals.get("frame")
        elif code.co_filename == checkpoint.__file__ and code.co_name == "checkpoint":
            region = frame.f_locals.get("gen")
            kept = None if region is None else region.gi_frame.f_locals.get("new_frame")
        if kept is not None:
            yield kept, code.co_name in ("backward", "unpack_hook")
        frame = frame.f_back
