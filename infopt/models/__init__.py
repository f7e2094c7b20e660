"""The families: one file each, readable from top to bottom."""

from infopt.models.gemma2 import Gemma2Config, gemma2
from infopt.models.gemma3 import Gemma3Config, gemma3
from infopt.models.gpt2 import GPT2Config, gpt2
from infopt.models.gpt_oss import GptOssConfig, gpt_oss
from infopt.models.llama import LlamaConfig, llama
from infopt.models.mistral import MistralConfig, mistral
from infopt.models.mixtral import MixtralConfig, mixtral
from infopt.models.phi3 import Phi3Config, phi3
from infopt.models.qwen2 import Qwen2Config, qwen2
from infopt.models.qwen3 import Qwen3Config, qwen3
from infopt.models.qwen3_moe import Qwen3MoeConfig, qwen3_moe
from infopt.models.smollm3 import SmolLM3Config, smollm3

__all__ = [
    "GPT2Config",
    "Gemma2Config",
    "Gemma3Config",
    "GptOssConfig",
    "LlamaConfig",
    "MistralConfig",
    "MixtralConfig",
    "Phi3Config",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "SmolLM3Config",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
]
