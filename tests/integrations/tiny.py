"""Tiny random models of every family of transformers whose experts carry its decorator, from one table of sizes."""

import functools
import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cmoe_kernels.integrations.experts import Family, experts_families

# A family's configuration takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "moe_layer_start_index": 0,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "sliding_window": 8,
    "mlp_layer_types": ["sparse", "sparse"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
}
# What the table above does not say, by experts class.
EXTRA: dict[str, dict[str, Any]] = {
    "BailingHybridExperts": {"layer_types": ["linear_attention", "full_attention"], "n_group": 1},
    "DeepseekV4Experts": {"mlp_layer_types": ["moe", "moe"]},
    "Glm5NextTextExperts": {"index_kpool": 8, "qk_rope_head_dim": 0},
    "Glm4vMoeTextExperts": {"head_dim": 128},
    "MiMoV2FlashExperts": {"num_key_value_heads": 2},
    "Mistral4Experts": {"head_dim": 16},
    "NemotronHExperts": {"n_groups": 2, "layers_block_type": ["attention", "moe"]},
    "Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 24},
    "DeepseekOcr2TextExperts": {"n_group": None, "topk_group": None},
    "Ernie4_5_VLMoeMoeExperts": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "Gemma4TextExperts": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "HYV4VLExperts": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "InklingExperts": {"rel_extent": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8},
    "Inkling2Experts": {"rel_extent": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8},
    "JambaExperts": {"attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "Lfm2MoeExperts": {"layer_types": ["conv", "full_attention"]},
    "MuseSparkExperts": {"moe_hidden_size": 16},
    "ZayaExperts": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# The model to build, where it is not the first of the module that holds the experts.
ORDER = ("ForCausalLM", "TextModel", "TalkerModel", "Model", "ForConditionalGeneration")


# Every family's module is imported once.
families = functools.cache(experts_families)


def tiny_model(family: Family, **extra: Any) -> PreTrainedModel:
    """The smallest model of a family's module that holds its experts, in fp32, with weights at a scale where experts matter."""
    module = sys.modules[family.experts.__module__]
    models = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and inspect.isclass(cls.config_class)
    ]
    models.sort(key=lambda cls: next((i for i, end in enumerate(ORDER) if cls.__name__.endswith(end)), len(ORDER)))
    problems = []
    for cls in models:
        if cls.__name__.endswith("PreTrainedModel"):
            continue
        try:
            config = tiny_config(cls.config_class, {**EXTRA.get(family.experts.__name__, {}), **extra})
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > 1_000_000:
                problems.append(f"{cls.__name__} has {size:,} parameters")
                continue
            torch.manual_seed(0)
            model = cls(config).eval()
        except Exception as error:
            problems.append(f"{cls.__name__}: {type(error).__name__}: {error}")
            continue
        if any(isinstance(m, family.experts) for m in model.modules()):
            return scaled(model)
        problems.append(f"{cls.__name__} has no {family.experts.__name__}")
    raise LookupError("; ".join(problems))


def tiny_inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 9) -> dict[str, Any]:
    """One batch without padding. Qwen3-Omni's talker has no table of embeddings."""
    if hasattr(model, "get_input_embeddings") and type(model).__name__ != "Qwen3OmniMoeTalkerModel":
        return {"input_ids": torch.randint(3, 60, (batch, tokens)), "use_cache": False}
    return {"inputs_embeds": torch.randn(batch, tokens, 32), "use_cache": False}


def tiny_config(cls: type, extra: dict[str, Any]) -> Any:
    known = cls().to_dict()
    sizes = {**SIZES, **extra}
    return cls(**{name: value for name, value in sizes.items() if name in known or name in extra})


def scaled(model: nn.Module) -> Any:
    """Weights of the size of a trained model's: the default ones leave the experts' outputs near zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model
