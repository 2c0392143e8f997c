"""A very small model, its processor, images and prompts for the tests of unimed.models."""

import numpy as np
import torch
from PIL import Image

from unimed.models.build import build_tiny
from unimed.models.unimed import UniMedForConditionalGeneration, UniMedProcessor

TEXTS = [
    "[INST] <Img><ImageHere></Img> [refer] give me the location of liver [/INST]",
    "[INST] <Img><ImageHere></Img> [vqa] which modality is this image, CT or MR? [/INST]",
    "[INST] [qa] where is the spleen? [/INST] in the left upper abdomen",
    "the liver is seen on the right side, the spleen on the left; both kidneys and the aorta are visible.",
]
REFER = "[INST] <Img><ImageHere></Img> [refer] give me the location of liver [/INST]"
VQA = "[INST] <Img><ImageHere></Img> [vqa] which modality? [/INST]"
QA = "[INST] [qa] where is the spleen? [/INST]"


def small(**changes) -> tuple[UniMedForConditionalGeneration, UniMedProcessor]:
    sizes = {"image_size": 32, "vision_width": 32, "vision_layers": 2, "vision_heads": 2, "vocab_size": 480}
    sizes |= {"text_width": 48, "text_layers": 2, "text_heads": 2, "text_hidden": 64}
    sizes |= {"connector": {"hidden_features": 24, "router_features": 12, "task_features": 8, "aux_losses": {"importance": 0.1}}}
    model, processor = build_tiny(TEXTS, **(sizes | changes))
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
