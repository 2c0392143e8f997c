"""The settings of upcycled layers, as a model's config.json keeps them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from unimed.errors import UserError

SCALES = ("released", "preserve")
ROUTERS = ("frozen", "learned")


@dataclass(frozen=True, kw_only=True)
class MoESettings:
    """Settings of :func:`unimed.models.medmoe.upcycle`; its docstring says what each means."""

    layers: tuple[int, ...]
    num_experts: int = 4
    top_k: int = 1
    meta: bool = True
    scale: str = "released"
    released: bool = False
    router: str = "frozen"
    router_layers: int = 1
    router_features: int | None = None
    router_bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name, value, choices in (
            ("scale", self.scale, SCALES),
            ("router", self.router, ROUTERS),
            ("router_layers", self.router_layers, (1, 2)),
        ):
            if value not in choices:
                raise UserError(f"{name} is {value!r}, must be one of {', '.join(map(str, choices))}")
        for name in ("num_experts", "router_features"):
            value = getattr(self, name)
            if not (value is None and name == "router_features") and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {value!r}, must be a positive integer")
        for name in ("meta", "released", "router_bias"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is {getattr(self, name)!r}, must be True or False")
        if type(self.top_k) is not int or not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"top_k is {self.top_k!r}, must be in 1..{self.num_experts} (num_experts)")
        if self.released and self.top_k > 2:
            raise UserError(f"top_k is {self.top_k}, must be 1 or 2 with released=True (the released gates choose no more)")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Any) -> "MoESettings":
        """The inverse of to_dict."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or "layers" not in values or set(values) - known:
            raise UserError(f"config.medmoe is {values!r}, must map layers and any of {', '.join(sorted(known - {'layers'}))} to values")
        return cls(**values)
