"""A model described: its vision tower, connector and language model, each from scratch, from a folder or from a hub name.

    language: {from: qwen2, width: 128, layers: 4, heads: 4}              from scratch, with a tokenizer trained on the texts
    language: {from: Qwen/Qwen2-0.5B, dtype: bf16, lora: {r: 8}}          weights and tokenizer from a hub, or from a folder
    vision: {from: checkpoints/clip-vit-base, freeze: true}

`unimed.models.build.build` makes the model. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from unimed.errors import UserError


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "Input should be a whole number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # torch's names

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Family:
    """What is special about an architecture of transformers.

    `unread`: parameters that no patch feature or token depends on; they never train. `mean`, `std`: of the images it was trained on.
    `defaults`: fields of its configuration, from scratch.
    """

    model_type: str
    unread: tuple[str, ...] = ()
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    defaults: tuple[tuple[str, Any], ...] = ()


# Tested, each at a tiny size. Any other model_type that AutoModel or AutoModelForCausalLM knows is tried by that name.
VISION = {
    "eva": Family("blip_2_vision_model", defaults=(("initializer_range", 0.02),)),  # its own default is meant for loaded weights
    "clip": Family("clip_vision_model", unread=("post_layernorm",)),
    "siglip": Family("siglip_vision_model", unread=("head",), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "dinov2": Family("dinov2", unread=("embeddings.mask_token",), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
LANGUAGE = {name: Family(name) for name in ("llama", "qwen2", "qwen3", "phi", "stablelm", "gemma")}
FAMILIES = VISION | LANGUAGE


def family(model_type: str) -> Family:
    """The family of a configuration of transformers."""
    return next((one for one in FAMILIES.values() if one.model_type == model_type), Family(model_type))


def from_scratch(source: str) -> bool:
    """Whether `from` names an architecture: one word. Folders and hub names have a slash or a dot."""
    return source != SMOLLM2 and re.fullmatch(r"[a-z0-9_]+", source) is not None


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, numbers have their range at the field."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Lora(Section):
    """Low-rank adapters on every Linear of a part, but not on the head of the language model; or on those that `targets` names."""

    r: Count = 8
    alpha: Count = 16
    dropout: Share = 0.05
    targets: list[str] = Field(default_factory=list)  # the last words of their names: q_proj, v_proj


class Vision(Section):
    """`width`, `layers`, `heads` and the two sizes are read from scratch; a folder or hub name has its own."""

    source: str = Field(default="eva", alias="from", min_length=1)
    image_size: Count = 96
    patch_size: Count = 8
    width: Count = 128
    layers: Count = 4
    heads: Count = 4
    config: dict[str, Any] = Field(default_factory=dict)  # more fields of the architecture's configuration
    freeze: bool = False
    dtype: Dtype = "fp32"
    lora: Lora | None = None


class Connector(Section):
    """The fields of CMoEConfig that are chosen; widths come from the vision and language sides.

    `from`: a saved model or run, whose connector is the start.
    """

    source: str = Field(default="", alias="from")
    num_experts: Count = 5
    hidden_features: Count | None = None
    expert: Literal["mlp", "linear"] = "mlp"
    expert_bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"] = "gelu"
    router: Literal["soft", "sparse", "hard", "constant"] = "soft"
    router_inputs: Literal["task_token", "token", "task"] = "task_token"
    router_layers: Literal[1, 2] = 2
    router_bias: bool = True
    router_features: Count | None = None
    task_features: Count | None = None
    num_task_tokens: Natural = 1
    top_k: Count = 2
    renormalize: bool = True
    resample: Literal["projection", "avgpool", "maxpool", "none"] = "projection"
    resample_rate: Count = 4
    aux_losses: dict[str, float] = Field(default_factory=dict)
    recompute: bool = False
    freeze: bool = False
    dtype: Dtype = "fp32"

    def settings(self) -> dict[str, Any]:
        """What CMoEConfig is given."""
        own = self.model_dump(exclude={"source", "freeze", "dtype"})
        return {name: value for name, value in own.items() if value is not None}


class Language(Section):
    """`width`, `layers`, `heads`, `mlp_width` and `vocab_size` are read from scratch, `archive` by smollm2 only."""

    source: str = Field(default="llama", alias="from", min_length=1)
    width: Count = 128
    layers: Count = 4
    heads: Count = 4
    mlp_width: Count = 384
    vocab_size: Count = 1024
    config: dict[str, Any] = Field(default_factory=dict)
    archive: str = ""  # the downloaded archive of SmolLM2, or its folder
    freeze: bool = False
    dtype: Dtype = "fp32"
    quantize: Literal["4bit", "8bit"] | None = None  # of its Linears but the head, by bitsandbytes; LoRA trains on top
    lora: Lora | None = None


class ModelSpec(Section):
    vision: Vision = Field(default_factory=Vision)
    connector: Connector = Field(default_factory=Connector)
    language: Language = Field(default_factory=Language)

    @model_validator(mode="after")
    def _fits(self) -> ModelSpec:
        for name, part, sizes in (
            ("vision", self.vision, ("image_size", "patch_size", "width", "layers", "heads")),
            ("language", self.language, ("width", "layers", "heads", "mlp_width", "vocab_size")),
        ):
            scratch = from_scratch(part.source)
            ignored = () if scratch else (*sizes, "config")
            if name == "language" and part.source != SMOLLM2:
                ignored = (*ignored, "archive")
            for key in ignored:
                given = getattr(part, key)
                if given != type(part).model_fields[key].get_default(call_default_factory=True):
                    raise UserError(f"{name}.{key}={given!r}: {name}.from={part.source!r} does not read it; leave it out")
            if scratch and part.width % part.heads:
                raise UserError(f"{name}.width={part.width}: must be a multiple of {part.heads}")
        vision, language = self.vision, self.language
        if from_scratch(vision.source) and vision.image_size % vision.patch_size:
            raise UserError(f"vision.image_size={vision.image_size}: must be a multiple of {vision.patch_size}")
        for name, trains in (
            ("vision", not vision.freeze and vision.lora is None),
            ("connector", not self.connector.freeze),
            ("language", not language.freeze and language.lora is None),
        ):
            if trains and getattr(self, name).dtype == "fp16":
                raise UserError(f"{name}.dtype='fp16': a part that trains whole is kept in fp32 or bf16; freeze it, or give it LoRA")
        if language.quantize and (from_scratch(language.source) or language.lora is None):
            what = "such weights do not train; add language.lora.r=8"
            what = "a model from scratch trains whole" if from_scratch(language.source) else what
            raise UserError(f"language.quantize={language.quantize!r}: {what}")
        if vision.lora and not language.lora and not language.freeze:
            raise UserError(
                "vision.lora: beside LoRA, the language model has LoRA too or is frozen; add language.lora.r=8 or language.freeze=true"
            )
        if vision.lora and language.lora and vision.lora.dropout != language.lora.dropout:
            raise UserError(f"vision.lora.dropout={vision.lora.dropout}: must be that of language.lora, {language.lora.dropout}")
        return self

    @property
    def lora(self) -> bool:
        """Whether any part has LoRA."""
        return self.vision.lora is not None or self.language.lora is not None
