"""A very small model, its processor, images and prompts for the tests of unimed.models."""

import numpy as np
import torch
from PIL import Image

from unimed.models.build import build
from unimed.models.spec import ModelSpec
from unimed.models.unimed import TASKS, UniMedForConditionalGeneration, UniMedProcessor

TEXTS = [
    "[INST] <Img><ImageHere></Img> [refer] give me the location of liver [/INST]",
    "[INST] <Img><ImageHere></Img> [vqa] which modality is this image, CT or MR? [/INST]",
    "[INST] [qa] where is the spleen? [/INST] in the left upper abdomen",
    "the liver is seen on the right side, the spleen on the left; both kidneys and the aorta are visible.",
]
REFER = "[INST] <Img><ImageHere></Img> [refer] give me the location of liver [/INST]"
VQA = "[INST] <Img><ImageHere></Img> [vqa] which modality? [/INST]"
QA = "[INST] [qa] where is the spleen? [/INST]"


def spec(vision=None, language=None, connector=None) -> ModelSpec:
    """A very small model, with changes to its parts."""
    return ModelSpec.model_validate(
        {
            "vision": {"image_size": 32, "width": 32, "layers": 2, "heads": 2, **(vision or {})},
            "connector": connector or {"hidden_features": 24, "router_features": 12, "task_features": 8, "aux_losses": {"importance": 0.1}},
            "language": {"vocab_size": 480, "width": 48, "layers": 2, "heads": 2, "mlp_width": 64, **(language or {})},
        }
    )


def small(tasks=TASKS, seed=0, **changes) -> tuple[UniMedForConditionalGeneration, UniMedProcessor]:
    model, processor = build(spec(**changes), TEXTS, tasks=tasks, seed=seed)
    return model.eval(), processor


def lively(model: UniMedForConditionalGeneration) -> UniMedForConditionalGeneration:
    """Weights large enough that an untrained model answers differently to different prompts and images."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
            elif parameter.dim() > 1:
                parameter.mul_(10)
    return model


def picture(seed: int, size: tuple[int, int] = (40, 28)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def batch(processor: UniMedProcessor, answers: bool = True):
    """Three tasks, two of them with an image."""
    replies = ["{<10><20><30><40>}", "in the left upper abdomen", "CT"] if answers else None
    return processor(text=[REFER, QA, VQA], images=[picture(1), picture(2)], answers=replies)
