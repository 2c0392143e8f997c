"""The Uni-Med model in the shape transformers expects: configuration, model, processor, and where they are built, loaded and adapted."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from unimed.model.build import build_tiny, released_config
from unimed.model.configuration import TASKS, UniMedConfig
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
    "build_tiny",
    "released_config",
    "train_tokenizer",
]
