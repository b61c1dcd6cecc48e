"""The GPT, its tokenizer and chat template, data formats, pretraining, generation."""

if __name__ != "trueup.base":  # `import base` from the repository's root would be a second copy
    raise ImportError("import trueup.base, not base: the root's folders are packages of trueup")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_gpt import GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTForSequenceClassification, GPTModel

# So that the Auto classes open a trueup directory without trust_remote_code.
AutoConfig.register(GPTConfig.model_type, GPTConfig)
AutoModel.register(GPTConfig, GPTModel)
AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM)
AutoModelForSequenceClassification.register(GPTConfig, GPTForSequenceClassification)

__all__ = ["GPTConfig", "GPTForCausalLM", "GPTForSequenceClassification", "GPTModel"]
