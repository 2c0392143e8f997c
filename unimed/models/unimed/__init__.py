"""Uni-Med in the shape that transformers expects: configuration, model, processor, tokenizer."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from unimed.models.unimed.configuration import TASKS, UniMedConfig
from unimed.models.unimed.modeling import UniMedForConditionalGeneration, UniMedOutput
from unimed.models.unimed.processing import UniMedProcessor
from unimed.models.unimed.tokenization import train_tokenizer

AutoConfig.register("unimed", UniMedConfig, exist_ok=True)
AutoModelForImageTextToText.register(UniMedConfig, UniMedForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(UniMedConfig, UniMedForConditionalGeneration, exist_ok=True)
AutoProcessor.register(UniMedConfig, UniMedProcessor, exist_ok=True)

__all__ = ["TASKS", "UniMedConfig", "UniMedForConditionalGeneration", "UniMedOutput", "UniMedProcessor", "train_tokenizer"]
