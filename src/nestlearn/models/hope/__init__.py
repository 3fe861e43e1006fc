"""Hope as a Hugging Face model; importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nestlearn.models.hope.cache import HopeCache
from nestlearn.models.hope.configuration import HopeConfig
from nestlearn.models.hope.modeling import (
    HopeBlock,
    HopeForCausalLM,
    HopeModel,
    HopeOutput,
    HopePreTrainedModel,
)

AutoConfig.register("hope", HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)

__all__ = [
    "HopeBlock",
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeModel",
    "HopeOutput",
    "HopePreTrainedModel",
]
