"""The model card that stands beside saved weights."""

import json
from pathlib import Path
from typing import Any

from unimed import io
from unimed.models.unimed.configuration import UniMedConfig
from unimed.notice import NOTICE


def _card(config: UniMedConfig, parameters: int, base: str | None) -> str:
    vision, text, connector = config.vision_config, config.text_config, config.connector
    settings = json.dumps(config.training, indent=2, sort_keys=True, default=str) if config.training else "not recorded"
    image = f"{vision.image_size} px in patches of {vision.patch_size}"
    tower = f"{vision.model_type}, {vision.num_hidden_layers} layers, width {vision.hidden_size}"
    language = f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, vocabulary {text.vocab_size}"
    router = f"{connector['router']} router on {connector['router_inputs']}"
    kind = f"LoRA and connector weights for the model in `{base}`" if base else "Whole model"

    def trained(frozen: bool) -> str:
        return "frozen" if frozen else "trained"

    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [medical, mixture-of-experts, uni-med]
---
# Uni-Med

**{NOTICE}.** Answers can be wrong, and nothing here was evaluated for clinical use.

## What it is

{kind}, {parameters:,} parameters: a vision tower, a connector mixture of experts with a task-aware router, and a language model.

| part | settings |
|---|---|
| vision tower | {tower}, {image}, {trained(config.freeze_vision)} |
| connector | {connector["num_experts"]} experts, {router}, {config.num_image_tokens} tokens an image, {trained(config.freeze_connector)} |
| language model | {language}, {trained(config.freeze_language)} |
| image tasks | {", ".join(config.tasks)} |

## Use

```python
from unimed.models import load

model, processor = load("this folder")
```

Boxes are written `{{<x1><y1><x2><y2>}}` in hundredths of the image's width and height.

## Connector

```json
{json.dumps(connector, indent=2, sort_keys=True)}
```

## Training settings

```json
{settings}
```
"""


def write_card(folder: Path, config: UniMedConfig, parameters: int, base: str | None = None) -> None:
    """Write README.md into `folder`; `base` names the model that an adapter belongs to."""
    io.write_text(folder / "README.md", _card(config, parameters, base))


def record_training(config: Any, settings: dict[str, Any]) -> None:
    """Keep the settings of a run in the configuration, from where they reach config.json and the model card."""
    config.training = json.loads(json.dumps(settings, default=str))
