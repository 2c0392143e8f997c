"""The release's YAML files become recipes."""

import pytest
import yaml
from typer.testing import CliRunner

from tests.unimed.test_convert import refused
from unimed.cli import app as cli
from unimed.models.convert import config
from unimed.train import recipe as recipes

RELEASED_YAML = """
model: {arch: uni_med, model_type: pretrain, image_size: 224, drop_path_rate: 0, use_grad_checkpoint: True, vit_precision: fp16,
  freeze_vit: True, resample_rate: 4, resample_method: projection, has_moe: True, projector_type: moe_mlp, num_experts: 5,
  router_method: router_task_token, num_task_tokens: 1, task_token_c: 5632, router_type: soft, llm_model_name: llama2, llm_model_path: "",
  sft_type: lora, lora_target_modules: [all], lora_r: 8, lora_alpha: 16, chat_template: True, max_txt_len: 1024, end_sym: "</s>"}
run: {task: image_text_pretrain, lr_sched: linear_warmup_cosine_lr, init_lr: 1e-5, min_lr: 1e-7, warmup_lr: 1e-6, weight_decay: 0.05,
  max_epoch: 1, num_workers: 6, warmup_steps: 5000, iters_per_epoch: 50000, seed: 42, output_dir: "", amp: True, resume_ckpt_path: null,
  evaluate: False, train_splits: [train], device: cuda, world_size: 1, dist_url: "env://", distributed: True, wandb_log: False, job_name: x}
"""

RATIOS = {
    "medqa_en": 2,
    "pubmedqa": 2,
    "slakevqa_en": 5,
    "path_vqa": 5,
    "ref_slake": 4,
    "invref_slake": 4,
    "ref_sa_med": 4,
    "invref_sa_med": 4,
}
RATIOS |= {"medpix_single": 8, "mimic_caption": 8, "medmnist_2d_small": 4}


def released_yaml():
    given = yaml.safe_load(RELEASED_YAML)
    text = {"text_processor": {"train": {"name": "blip_caption_new"}}}
    given["datasets"] = {name: {"batch_size": 4, "sample_ratio": ratio, **text} for name, ratio in RATIOS.items()}
    return given


def test_the_release_s_yaml_is_our_recipe(tmp_path):
    (tmp_path / "uni_med.yaml").write_text(yaml.safe_dump(released_yaml()))
    result = CliRunner().invoke(cli.app, ["convert", "config", f"{tmp_path / 'uni_med.yaml'}", "--out", f"{tmp_path / 'ours.yaml'}"])
    assert result.exit_code == 0, result.output
    made, ours = (recipes.flat(recipes.load(name)) for name in (tmp_path / "ours.yaml", "unimed-7b-release"))
    assert {key for key in ours if made[key] != ours[key]} == {"name", "description", "data.workers", "connector.hidden_features"}
    assert sum(recipes.load(tmp_path / "ours.yaml").sampler.ratios.values()) == 50


def test_other_settings_of_the_release_s_yaml():
    given = released_yaml()
    given["model"] |= {
        "sft_type": "none",
        "router_type": "sparse",
        "sparse_topk": 3,
        "router_method": "router_token",
        "resample_method": "avgpool",
    }
    recipe = config.recipe_of("f", given)[0]
    assert recipe["language"]["freeze"] is True
    assert recipe["connector"] == {
        "num_experts": 5, "router": "sparse", "router_inputs": "token", "router_features": 4 * 1408, "top_k": 3, "expert": "mlp",
        "resample": "avgpool", "resample_rate": 4,
    }  # fmt: skip
    given["model"] |= {"has_moe": False, "projector_type": "mlp2x_gelu"}
    assert config.recipe_of("f", given)[0]["connector"]["num_experts"] == 1


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"num_expert": 5}, "unknown key model.num_expert; nearest: model.num_experts"),
        ("model", {"projector_type": "mlp3x_gelu"}, "model.projector_type='mlp3x_gelu' is not supported; 'moe_mlp', "),
        ("model", {"has_moe": False}, "do not go together"),
        ("model", {"num_task_tokens": 10}, "num_task_tokens=10 is not supported"),
        ("model", {"image_size": "big"}, "model.image_size='big' must be a number"),
        ("run", {"init_lrs": 1}, "unknown key run.init_lrs; nearest: run.init_lr"),
        ("datasets", {"vqav2": {}}, "unknown key datasets.vqav2"),
        ("datasets", {"path_vqa": {"batch_size": 8}}, "batch_size must be one number"),
    ],
)
def test_wrong_yaml_is_one_line(section, change, message):
    given = released_yaml()
    given[section] |= change
    refused(message, config.recipe_of, "f.yaml", given)
