"""Where the projector of each multimodal model of transformers sits, and what stays around its linear layers.

An :class:`Adapter` per model type. The connector takes the place of the linear layers alone: norms, pixel shuffle, pooling and the merging
of patches remain the family's own code.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Images(NamedTuple):
    """Of each image in the order of the batch: ``rows`` of what the projector reads, ``tokens`` of the text that it becomes."""

    rows: list[int]
    tokens: list[int]


ImageLayout = Callable[[Any, dict[str, Any], str, Tensor, int], Images]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How the projector of a model type is found and replaced.

    Args:
        model_type: ``config.model_type`` of the models.
        model_class: their class with a language-model head, or its name in transformers.
        projector: path from the model to the projector. A last part "*" stands for every item of a list; several paths for several
            projectors, which then have connectors of their own.
        layers: names inside the projector: (linear, activation, linear), or (linear,); "" for the projector itself.
        replaces: name inside the projector of the module whose place the connector takes; "" for the projector itself. Other ``layers``
            become identities.
        around: in words, what of the projection stays outside the experts.
        images: how rows of the projector belong to images, where a row is not one image token of the text, in its order (within an
            image any order will do): called with (model, arguments of forward, "image" or "video", features, tokens of that kind in
            the text).
        rebuild: makes of the projector an equal one whose linear layers are modules, where they are not.
    """

    model_type: str
    model_class: str | type
    projector: str | Sequence[str]
    layers: tuple[str, ...]
    replaces: str
    around: str
    images: ImageLayout | None = None
    rebuild: Callable[[nn.Module], nn.Module] | None = None

    def __post_init__(self) -> None:
        if len(self.layers) not in (1, 3):
            raise ValueError(f"layers are {self.layers}, must be (linear,) or (linear, activation, linear)")

    @property
    def projectors(self) -> tuple[str, ...]:
        return (self.projector,) if isinstance(self.projector, str) else tuple(self.projector)


_MLP = ("linear_1", "act", "linear_2")


def _tiles(model: Any, inputs: dict[str, Any], kind: str, features: Tensor, tokens: int) -> Images:
    """An image is cut into tiles; after the projector, padding is cut off and a token is added to each line."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, length = model.config, features.shape[-2]
    if kind == "video":  # frames of equal number in each video, pooled after the projector
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        return Images([frames * length] * videos, [tokens // videos] * videos)
    sizes, images_of_samples = inputs["image_sizes"], inputs.get("batch_num_images")
    # Several images in one sample are not cut.
    cut = [True] * len(sizes) if images_of_samples is None else [n == 1 for n in images_of_samples for _ in range(int(n))]
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if is_cut else 1
        for size, is_cut in zip(sizes, cut, strict=True)
    ]
    # The model's own packing, of one channel, says how many tokens it leaves.
    packing = model.model.pack_image_features
    choice = {name: getattr(config, name) for name in inspect.signature(packing).parameters if name.startswith("vision_")}
    blank = [features.new_zeros(n, length, 1) for n in tiles]
    _, packed = packing(blank, sizes, image_newline=features.new_zeros(1), **choice)
    return Images([n * length for n in tiles], packed.tolist())


class PooledProjector(nn.Module):
    """Gemma 3's projector with its matrix as a linear layer: average pooling on the grid, RMS norm, projection."""

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.mm_soft_emb_norm: Any = projector.mm_soft_emb_norm
        self.avg_pool: Any = projector.avg_pool
        weight = projector.mm_input_projection_weight
        inner, outer = weight.shape
        self.mm_input_projection = nn.Linear(inner, outer, bias=False, device="meta")
        self.mm_input_projection.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)

    def forward(self, features: Tensor) -> Tensor:
        batch, patches, width = features.shape
        side = round(patches**0.5)
        grid = features.transpose(1, 2).reshape(batch, width, side, side)
        pooled = self.avg_pool(grid).flatten(2).transpose(1, 2)
        return self.mm_input_projection(self.mm_soft_emb_norm(pooled)).type_as(features)


def _llava(model_type: str, model_class: str, **settings: Any) -> Adapter:
    defaults = {"projector": "model.multi_modal_projector", "layers": _MLP, "replaces": "", "around": "nothing"}
    return Adapter(model_type=model_type, model_class=model_class, **{**defaults, **settings})


def _qwen(model_type: str, model_class: str, **settings: Any) -> Adapter:
    defaults = {
        "projector": "model.visual.merger",
        "layers": ("mlp.0", "mlp.1", "mlp.2"),
        "replaces": "mlp",
        "around": "norm, then the merging of neighbouring patches",
    }
    return Adapter(model_type=model_type, model_class=model_class, **{**defaults, **settings})


_DEEPSTACK = {
    "projector": ("model.visual.merger", "model.visual.deepstack_merger_list.*"),
    "layers": ("linear_fc1", "act_fn", "linear_fc2"),
    "replaces": "linear_fc1",
    "around": "norm and the merging of neighbouring patches; a connector for the output and for each DeepStack level",
}

FAMILIES = (
    _llava("llava", "LlavaForConditionalGeneration"),
    _llava("llava_next", "LlavaNextForConditionalGeneration", images=_tiles, around="nothing (unpadding and newlines come after it)"),
    _llava(
        "llava_onevision", "LlavaOnevisionForConditionalGeneration", images=_tiles, around="nothing (unpadding, newlines, pooling after it)"
    ),
    _llava("vipllava", "VipLlavaForConditionalGeneration", replaces="linear_1", around="the norm of the concatenated layers"),
    _llava("paligemma", "PaliGemmaForConditionalGeneration", layers=("linear",)),
    _llava(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        layers=("mm_input_projection",),
        replaces="mm_input_projection",
        around="average pooling, then norm",
        rebuild=PooledProjector,
    ),
    _llava("internvl", "InternVLForConditionalGeneration", replaces="linear_1", around="pixel shuffle, then norm"),
    _llava("mistral3", "Mistral3ForConditionalGeneration", replaces="linear_1", around="norm, then the learned merging of patches"),
    _qwen("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    _qwen("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    _qwen("qwen3_vl", "Qwen3VLForConditionalGeneration", **_DEEPSTACK),
    _qwen("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", **_DEEPSTACK),
    _llava(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        projector="model.connector.modality_projection",
        layers=("proj",),
        around="pixel shuffle",
    ),
    _llava(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        projector="model.connector.modality_projection",
        layers=("proj",),
        around="pixel shuffle",
    ),
    _llava("blip-2", "Blip2ForConditionalGeneration", projector="language_projection", layers=("",), around="the Q-Former"),
)

# Model types with images and nothing for experts to replace.
WITHOUT_PROJECTOR = {
    "fuyu": "it feeds pixel patches through one linear layer straight into the language model and has no vision encoder",
    "chameleon": "its images are tokens of a discrete codebook",
    "emu3": "its images are tokens of a discrete codebook",
    "janus": "its aligners serve understanding and generation of images at once",
    "idefics": "its language model reads images by cross-attention",
    "mllama": "its language model reads images by cross-attention",
}
