"""The Uni-Med model in the shape transformers expects: configuration, model, processor, and where they are built, loaded and adapted."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from unimed.model.build import build_smollm2, build_tiny, released_config
from unimed.model.configuration import TASKS, UniMedConfig
from unimed.model.load import apply_released, import_released, load
from unimed.model.lora import add_lora, merge
from unimed.model.modeling import UniMedForConditionalGeneration, UniMedOutput
from unimed.model.processing import UniMedProcessor
from unimed.model.tokenization import train_tokenizer

AutoConfig.register("unimed", UniMedConfig, exist_ok=True)
AutoModelForImageTextToText.register(UniMedConfig, UniMedForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(UniMedConfig, UniMedForConditionalGeneration, exist_ok=True)
AutoProcessor.register(UniMedConfig, UniMedProcessor, exist_ok=True)

__all__ = [
    "TASKS",
    "UniMedConfig",
    "UniMedForConditionalGeneration",
    "UniMedOutput",
    "UniMedProcessor",
    "add_lora",
    "apply_released",
    "build_smollm2",
    "build_tiny",
    "import_released",
    "load",
    "merge",
    "released_config",
    "train_tokenizer",
]
