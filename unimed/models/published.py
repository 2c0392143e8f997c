"""Published weights that recipes name: sizes, licence, and where they come from. Nothing of them is shipped.

A folder's name says which it is (`checkpoints/eva-vit-g`), so that a model can be described where its weights are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Published:
    """`config`: model_type of transformers and the fields of its configuration. `how`: the command that makes the folder. `hub`: its name
    there, which `from` takes as well."""

    title: str
    config: Mapping[str, Any]
    where: str
    licence: str
    how: str
    size: str
    hub: str = ""


_EVA = Published(
    "EVA-CLIP ViT-g of BLIP-2 (39 layers, width 1408)",
    {"model_type": "blip_2_vision_model"},  # its defaults are these sizes
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth",
    "MIT (EVA); BLIP-2's code is BSD-3-Clause",
    "unimed convert eva eva_vit_g.pth --out {folder}",
    "2.0 GB",
)
_LLAMA = Published(
    "Llama-2-7B-chat",
    {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf (access is granted on request)",
    "Llama 2 Community License",
    "unimed convert llama FOLDER --out {folder}, or a snapshot of the hub",
    "13.5 GB",
    "meta-llama/Llama-2-7b-chat-hf",
)
PUBLISHED = {"eva-vit-g": _EVA, "llama-2-7b-chat": _LLAMA, "llama-2-7b-chat-hf": _LLAMA}


def published(source: str) -> Published | None:
    """The weights that a folder's or hub's name stands for."""
    return PUBLISHED.get(PurePosixPath(source).name.lower())
