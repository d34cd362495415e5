"""The network, its configuration and its cache."""

from transformers import AutoConfig, AutoModel

from dlmlib.model.config import DLMConfig
from dlmlib.model.kv_cache import KVCache
from dlmlib.model.network import DiffusionLM, DLMOutput
from dlmlib.model.upstream import Dream, DreamConfig, LLaDA, LLaDAConfig

AutoConfig.register(DLMConfig.model_type, DLMConfig)
AutoModel.register(DLMConfig, DiffusionLM)

__all__ = [
    "DLMConfig",
    "DLMOutput",
    "DiffusionLM",
    "Dream",
    "DreamConfig",
    "KVCache",
    "LLaDA",
    "LLaDAConfig",
]
