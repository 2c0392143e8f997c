"""Llama to a folder of transformers with safetensors: from Meta's files (consolidated.*.pth, params.json, tokenizer.model), or from a
folder of transformers whose weights are still *.bin."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.utils import is_protobuf_available, is_sentencepiece_available, logging

from unimed import io
from unimed.errors import UserError
from unimed.models.convert import checkpoint
from unimed.models.convert.checkpoint import Row
from unimed.models.keys import require_same_keys

POSITIONS = 4096  # of Llama 2; params.json does not say
# Meta's name, ours, and the axis along which its files divide it.
META: dict[str, tuple[str, int | None]] = {
    "tok_embeddings": ("model.embed_tokens", 1),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
OURS = {ours: theirs for theirs, (ours, _) in META.items()}


def convert(source: Path, out: Path) -> list[Row]:
    """Write the model and its tokenizer to the new folder `out`."""
    checkpoint.refuse_existing(out)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if (source / "params.json").is_file():
        config, state, rows = _of_meta(source)
        tokenizer = _tokenizer(source)
    elif (source / "config.json").is_file():
        config, state, rows = _of_transformers(source)
        tokenizer = _tokenizer(source)
    else:
        raise UserError(f"{source}: no params.json (with consolidated.*.pth) and no config.json (with *.safetensors or *.bin) there")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the weights have {config.vocab_size}")

    def fill(folder: Path) -> None:
        save_torch_state_dict(state, folder)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    io.write_folder(out, fill)
    return rows


def _wanted(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not (config.tie_word_embeddings and key == "lm_head.weight")}


# Meta's files


def their_key(ours: str) -> str:
    """Meta's name of a tensor of LlamaForCausalLM."""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", ours):
        return f"layers.{layer[1]}.{OURS[layer[2]]}.weight"
    return OURS[ours.removesuffix(".weight")] + ".weight"


def _of_meta(source: Path) -> tuple[LlamaConfig, dict[str, Tensor], list[Row]]:
    files = sorted(source.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{source}: params.json is there, and consolidated.00.pth is not")
    shards = [checkpoint.tensors(file, checkpoint.read(file)) for file in files]
    shards = [{key: value for key, value in shard.items() if key != "rope.freqs"} for shard in shards]
    for file, shard in zip(files, shards, strict=True):
        require_same_keys(f"{file}, beside {files[0].name}", dict.fromkeys(shard, ()), dict.fromkeys(shards[0], ()))
    config = _meta_config(source, shards)
    wanted = _wanted(config)
    ours = {their_key(key): key for key in wanted}
    state = {key: _joined(key, [shard[key] for shard in shards]) for key in shards[0]}
    columns, width = state["tok_embeddings.weight"].shape[-1], config.hidden_size
    if columns < width:
        raise UserError(f"{source}: {len(files)} files hold {columns} of {width} columns of tok_embeddings.weight: one is missing")
    require_same_keys(str(source), checkpoint.shapes(state), {theirs: wanted[key] for theirs, key in ours.items()})
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    made = {}
    for theirs, key in ours.items():
        count = next((count for name, count in heads.items() if f".{name}." in key), None)
        made[key] = state[theirs] if count is None else _halves(state[theirs], count)
    return config, made, checkpoint.key_map(ours.items())


def _meta_config(source: Path, shards: list[dict[str, Tensor]]) -> LlamaConfig:
    given = io.read_json(source / "params.json")
    try:
        width, layers, heads = (int(given[name]) for name in ("dim", "n_layers", "n_heads"))
        first = [shard["layers.0.feed_forward.w1.weight"] for shard in shards]
        output = [shard["output.weight"] for shard in shards]
        return LlamaConfig(
            vocab_size=sum(part.shape[0] for part in output),
            hidden_size=width,
            intermediate_size=sum(part.shape[0] for part in first),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=int(given.get("n_kv_heads") or heads),
            rms_norm_eps=float(given["norm_eps"]),
            rope_parameters={"rope_type": "default", "rope_theta": float(given.get("rope_theta", 10000.0))},
            max_position_embeddings=POSITIONS,
            dtype=first[0].dtype,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source}: params.json and consolidated.*.pth do not describe a Llama: {str(error) or type(error).__name__}"
        ) from error


def _joined(key: str, parts: list[Tensor]) -> Tensor:
    name = re.sub(r"layers\.\d+\.", "", key).removesuffix(".weight")
    axis = META.get(name, ("", None))[1]
    return parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order in which transformers rotates: a head's real parts, then its imaginary ones. Meta has them in pairs."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse: rows as Meta has them."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


# A folder of transformers


def _of_transformers(source: Path) -> tuple[LlamaConfig, dict[str, Tensor], list[Row]]:
    config = _quiet(source, lambda: AutoConfig.from_pretrained(source, local_files_only=True))
    if not isinstance(config, LlamaConfig):
        raise UserError(f"{source}: config.json is of a {config.model_type!r} model, it must be 'llama'")
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _load(file)
    if not files:
        raise UserError(f"{source}: no *.safetensors and no pytorch_model*.bin there")
    made = {key: value for key, value in state.items() if not key.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        made.pop("lm_head.weight", None)
    require_same_keys(str(source), checkpoint.shapes(made), _wanted(config))
    config.dtype = made["model.embed_tokens.weight"].dtype
    unused = [(key, "not used: computed") for key in state if key not in made]
    return config, made, checkpoint.key_map([*((key, key) for key in made), *unused])


def _load(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".bin":
        return checkpoint.tensors(file, checkpoint.read(file))
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error


def _tokenizer(source: Path) -> Any:
    kind: Any = AutoTokenizer
    if not (source / "tokenizer.json").is_file():
        kind = LlamaTokenizer
        if not (source / "tokenizer.model").is_file():
            raise UserError(f"{source}: no tokenizer.model and no tokenizer.json there")
        if not (is_sentencepiece_available() and is_protobuf_available()):
            raise UserError(f"{source}: tokenizer.model is read by packages that are not here: pip install sentencepiece protobuf")
    return _quiet(source, lambda: kind.from_pretrained(source, local_files_only=True))


def _quiet(source: Path, read: Callable[[], Any]) -> Any:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return read()
    except Exception as error:  # transformers and tokenizers each have their own
        raise UserError(f"{source}: cannot be read: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
