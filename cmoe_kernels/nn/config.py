"""The settings of a connector."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cmoe_kernels.ops.activation import ACTIVATIONS, Activation
from cmoe_kernels.ops.task_router import ROUTER_INPUTS, RouterInputs

Expert = Literal["mlp", "linear"]
Router = Literal["soft", "sparse", "hard", "constant"]
Resample = Literal["projection", "avgpool", "maxpool", "none"]
# The routers whose outputs each auxiliary loss can be computed from.
AUX_LOSSES = {"switch": ("sparse",), "sample_switch": ("sparse",), "importance": get_args(Router), "z": ("soft", "sparse")}
TASKS = ("vqa", "refer", "identify", "caption", "cls")


@dataclass(frozen=True, kw_only=True)
class CMoEConfig:
    """Settings of a :class:`CMoEConnector`; the defaults are those of the released Uni-Med.

    Args:
        in_features: width C of the encoder's tokens.
        out_features: width O of the language model.
        hidden_features: width H of an expert's hidden layer; default ``out_features``.
        num_experts: E.
        expert: "mlp" (Linear, activation, Linear) or "linear".
        expert_bias: biases in the experts.
        router: "soft" (all experts, normalised sigmoids), "sparse" (top k, softmax over the chosen), "hard" (task i goes to expert i),
            "constant" (all experts, 1/E each).
        router_inputs: what a soft or sparse router reads: "task_token" (both), "token" (the image token) or "task".
        router_layers: 2 (Linear, activation, Linear) or 1.
        router_features: hidden width R of the router; default 4 times its input.
        router_bias: biases in the router.
        top_k: K of the sparse router.
        renormalize: divide the sparse router's K weights by their sum; False keeps the probabilities of the softmax over all experts. With
            ``top_k=1`` the divided weight is always 1, which teaches the router nothing.
        task_features: width S of a task token; default the experts' input width D.
        num_task_tokens: learnable tokens per task, 1 or 0; they exist only where the router reads them.
        tasks: names of the tasks, in order.
        resample: how P encoder tokens become N: "projection" (``resample_rate`` consecutive tokens side by side), "avgpool" or "maxpool"
            (on the square grid), "none".
        resample_rate: P / N; for pooling a square number.
        aux_losses: weights by name: {"switch": 0.1, "importance": 0.01, "z": 0.01}. "sample_switch" is CuMo's balance loss: of the first
            choices in each sample of features [B, P, C], then the mean over samples.
        activation: "gelu" (erf), "gelu_tanh", "silu", "relu" or "relu2" (its square).
        recompute: save x and gates alone for backward and compute hidden layers again.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or a combination that has no meaning; the message names it.
    """

    in_features: int
    out_features: int
    hidden_features: int | None = None
    num_experts: int = 5
    expert: Expert = "mlp"
    expert_bias: bool = True
    router: Router = "soft"
    router_inputs: RouterInputs = "task_token"
    router_layers: int = 2
    router_features: int | None = None
    router_bias: bool = True
    top_k: int = 2
    renormalize: bool = True
    task_features: int | None = None
    num_task_tokens: int = 1
    tasks: tuple[str, ...] = TASKS
    resample: Resample = "projection"
    resample_rate: int = 4
    aux_losses: dict[str, float] = field(default_factory=dict)
    activation: Activation = "gelu"
    recompute: bool = False

    def __post_init__(self) -> None:
        tasks = tuple(self.tasks) if isinstance(self.tasks, Iterable) else None
        if isinstance(self.tasks, str) or tasks is None or not all(isinstance(name, str) for name in tasks):
            raise TypeError(f"tasks is {self.tasks!r}, must be a sequence of names")
        if not isinstance(self.aux_losses, Mapping):
            raise TypeError(f"aux_losses is {self.aux_losses!r}, must be a dict of weights by name")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "aux_losses", dict(self.aux_losses))
        for name, value, choices in (
            ("expert", self.expert, get_args(Expert)),
            ("router", self.router, get_args(Router)),
            ("router_inputs", self.router_inputs, ROUTER_INPUTS),
            ("router_layers", self.router_layers, (1, 2)),
            ("num_task_tokens", self.num_task_tokens, (0, 1)),
            ("resample", self.resample, get_args(Resample)),
            ("activation", self.activation, ACTIVATIONS),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(str, choices))}")
        counts = ["in_features", "out_features", "hidden_features", "num_experts", "router_features", "task_features", "resample_rate"]
        for name in counts + ["top_k"] * (self.router == "sparse"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, must be a positive integer")
        if self.router == "sparse" and self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, must be in 1..{self.num_experts} (num_experts)")
        if len(set(self.tasks)) != len(self.tasks) or (self.needs_task and not self.tasks):
            raise ValueError(f"tasks are {self.tasks}, must be different names" + (", at least one" if not self.tasks else ""))
        if self.router == "hard" and len(self.tasks) > self.num_experts:
            raise ValueError(f"num_experts is {self.num_experts}, must be at least {len(self.tasks)} with router='hard' (one per task)")
        if self.uses_task_tokens and self.num_task_tokens == 0:
            raise ValueError(f"num_task_tokens is 0, must be 1 with router_inputs={self.router_inputs!r}")
        if self.resample in ("avgpool", "maxpool") and math.isqrt(self.resample_rate) ** 2 != self.resample_rate:
            raise ValueError(f"resample_rate is {self.resample_rate}, must be a square number with resample={self.resample!r}")
        for name, weight in self.aux_losses.items():
            if self.router not in AUX_LOSSES.get(name, ()):
                able = [n for n, routers in AUX_LOSSES.items() if self.router in routers]
                raise ValueError(f"aux_losses has {name!r}, must be among {', '.join(able)} with router={self.router!r}")
            if not isinstance(weight, (int, float)):
                raise ValueError(f"aux_losses[{name!r}] is {weight!r}, must be a number")

    @property
    def features(self) -> int:
        """D, the width of what the experts read."""
        return self.in_features * (self.resample_rate if self.resample == "projection" else 1)

    @property
    def hidden(self) -> int:
        """H, the experts' hidden width."""
        return self.hidden_features or self.out_features

    @property
    def learned(self) -> bool:
        """Whether there is a router with weights."""
        return self.router in ("soft", "sparse")

    @property
    def router_never_learns(self) -> bool:
        """Whether no gradient reaches the router: its one weight is 1, and no auxiliary loss reads its logits."""
        constant = self.router == "sparse" and self.top_k == 1 and self.renormalize
        return constant and not any(self.aux_losses.get(name) for name in ("switch", "sample_switch", "z"))

    @property
    def uses_task_tokens(self) -> bool:
        return self.learned and self.router_inputs != "token"

    @property
    def needs_task(self) -> bool:
        """Whether forward needs to know each sample's task."""
        return self.uses_task_tokens or self.router == "hard"

    @property
    def task_width(self) -> int:
        """S, the width of a task token."""
        return self.task_features or self.features

    @property
    def router_in(self) -> int:
        """Width of the router's input."""
        return {"task_token": self.task_width + self.features, "token": self.features, "task": self.task_width}[self.router_inputs]

    @property
    def router_hidden(self) -> int:
        """R, the router's hidden width."""
        return self.router_features or 4 * self.router_in

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        return {**dataclasses.asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CMoEConfig":
        """The inverse of to_dict; an unknown key is an error."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}; known are {', '.join(f.name for f in dataclasses.fields(cls))}")
        return cls(**values)
