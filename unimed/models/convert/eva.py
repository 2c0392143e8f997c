"""EVA-CLIP ViT-g as BLIP-2 publishes it (eva_vit_g.pth), to a tower of transformers.

The file holds biases for queries and values only; the tower has one bias for all three, with zeros for the keys. The release's last norm
is not in the file and never trained: it stays the identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Blip2VisionConfig, BlipImageProcessorPil

from unimed import io
from unimed.errors import UserError
from unimed.models.convert import checkpoint
from unimed.models.convert.checkpoint import Row
from unimed.models.keys import require_same_keys
from unimed.models.spec import VISION
from unimed.models.unimed.modeling import EvaVisionModel

DEPTH = 39  # blocks that BLIP-2 and the release run
HEAD = 88  # width of a head; no shape shows it
QKV = ("q_bias", "v_bias")
NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
THEIRS = {ours: theirs for theirs, ours in NAMES.items()}
UNUSED = re.compile(r"(norm|fc_norm|head|lm_head|rel_pos_bias)\..+|mask_token|logit_scale")
LAST_NORM = ("post_layernorm.weight", "post_layernorm.bias")


def their_key(ours: str) -> str:
    """The file's name of a tensor of the tower; of qkv.bias, the part for the queries."""
    if block := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", ours):
        number, name, kind = block.groups()
        return f"blocks.{number}.attn.q_bias" if (name, kind) == ("self_attn.qkv", "bias") else f"blocks.{number}.{THEIRS[name]}.{kind}"
    stem, _, kind = ours.rpartition(".")
    return f"{THEIRS[stem]}.{kind}" if stem in THEIRS else THEIRS[ours]


def tower_state(where: str, file: Mapping[str, Tensor], image_size: int = 224) -> tuple[Blip2VisionConfig, dict[str, Tensor], list[Row]]:
    """Configuration and tensors of the tower, and the key map."""
    pairs: list[tuple[str, str]] = []
    state: dict[str, Tensor] = {}
    for key, value in file.items():
        block = re.match(r"blocks\.(\d+)\.", key)
        if block and int(block[1]) >= DEPTH:
            pairs.append((key, f"not used: the tower has {DEPTH} blocks"))
        elif UNUSED.fullmatch(key):
            pairs.append((key, "not used: what comes after the blocks"))
        else:
            state[key] = value
    config = _config(where, state, image_size)
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in EvaVisionModel(config).state_dict().items()}
    ours = {their_key(key): key for key in wanted if key not in LAST_NORM}
    if "pos_embed" in state and state["pos_embed"].dim() == 3:
        state["pos_embed"] = _resized(where, state["pos_embed"], wanted["embeddings.position_embedding"][1])
    expected = {theirs: wanted[key] for theirs, key in ours.items()}
    for key in [key for key in expected if key.endswith("q_bias")]:
        expected[key] = expected[key.replace("q_bias", "v_bias")] = (config.hidden_size,)
    require_same_keys(where, checkpoint.shapes(state), expected)
    made = {}
    for theirs, key in ours.items():
        if theirs.endswith("q_bias"):
            q, v = (state[theirs.replace("q_bias", name)] for name in QKV)
            made[key] = torch.cat([q, torch.zeros_like(q), v])
            pairs += [(theirs.replace("q_bias", name), key) for name in QKV]
        else:
            made[key] = state[theirs]
            pairs.append((theirs, key))
    like = made["embeddings.class_embedding"]
    made |= {LAST_NORM[0]: torch.ones_like(like[0, 0]), LAST_NORM[1]: torch.zeros_like(like[0, 0])}
    rows = [*checkpoint.key_map(pairs), Row("(none: one and zero)", "post_layernorm.*", 2)]
    return config, made, rows


def tower_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, without the last norm."""
    file = {}
    for key, value in state.items():
        theirs = "" if key in LAST_NORM else their_key(key)
        if theirs.endswith("q_bias"):
            file[theirs], keys, file[theirs.replace("q_bias", "v_bias")] = value.chunk(3)
            if keys.any():
                raise UserError(f"{key}: the tower's key bias is not zero, and the released layout has no place for it")
        elif theirs:
            file[theirs] = value
    return file


def convert(file: Path, out: Path, image_size: int = 224) -> list[Row]:
    """Write the tower to the new folder `out`."""
    checkpoint.refuse_existing(out)
    config, state, rows = tower_state(str(file), checkpoint.tensors(file, checkpoint.read(file)), image_size)
    known = VISION["eva"]
    with torch.device("meta"):
        model = EvaVisionModel(config)
    size = {"height": image_size, "width": image_size}
    processor = BlipImageProcessorPil(size=size, image_mean=list(known.mean), image_std=list(known.std))

    def fill(folder: Path) -> None:
        model.save_pretrained(folder, state_dict={key: value.contiguous() for key, value in state.items()})
        processor.save_pretrained(folder)

    io.write_folder(out, fill)
    return rows


def _config(where: str, state: Mapping[str, Tensor], image_size: int) -> Blip2VisionConfig:
    """The sizes that the shapes show."""
    depth = 1 + max((int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    patch, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if patch is None or patch.dim() != 4 or hidden is None or hidden.dim() != 2:
        raise UserError(f"{where}: no EVA tower: patch_embed.proj.weight and blocks.0.mlp.fc1.weight must be there, as in eva_vit_g.pth")
    width, size = patch.shape[0], patch.shape[-1]
    if width % HEAD or image_size % size:
        raise UserError(f"{where}: width {width} must be a multiple of {HEAD}, and the image size {image_size} of the patch size {size}")
    return Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=hidden.shape[0],
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD,
        image_size=image_size,
        patch_size=size,
    )


def _resized(where: str, table: Tensor, tokens: int) -> Tensor:
    """The table of positions at another image size, bicubic, as the release does."""
    if table.shape[1] == tokens:
        return table
    old, new = (round((count - 1) ** 0.5) for count in (table.shape[1], tokens))
    if old * old != table.shape[1] - 1:
        raise UserError(f"{where}: pos_embed is {list(table.shape)}: its {table.shape[1] - 1} places are no square")
    grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
