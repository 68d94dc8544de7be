"""Methods of parameter-efficient fine-tuning, one pass per file."""

from passes.adalora import Adalora as Adalora
from passes.adapter import Adapter as Adapter
from passes.adapterhub import AdapterHubAdapter as AdapterHubAdapter
from passes.bake import Bake as Bake
from passes.compose import Compose as Compose
from passes.dequantise import Dequantise as Dequantise
from passes.diff_pruning import Binarise as Binarise
from passes.ia3 import Ia3 as Ia3
from passes.intrinsic import Intrinsic as Intrinsic
from passes.layer_norm_tuning import LayerNormTuning as LayerNormTuning
from passes.loftq import Loftq as Loftq
from passes.loha import Loha as Loha
from passes.lokr import Lokr as Lokr
from passes.lora import Lora as Lora
from passes.loralib import LoralibAdapter as LoralibAdapter
from passes.merge import Merge as Merge
from passes.nf4 import Nf4 as Nf4
from passes.peft import PeftAdapter as PeftAdapter
from passes.prefix import Prefix as Prefix
from passes.prompt import Prompt as Prompt
from passes.prune import Prune as Prune
from passes.select import Select as Select
from passes.trainable_tokens import TrainableTokens as TrainableTokens
from passes.vera import Vera as Vera

__all__ = [
    "Adalora",
    "Adapter",
    "AdapterHubAdapter",
    "Bake",
    "Binarise",
    "Compose",
    "Dequantise",
    "Ia3",
    "Intrinsic",
    "LayerNormTuning",
    "Loftq",
    "Loha",
    "Lokr",
    "Lora",
    "LoralibAdapter",
    "Merge",
    "Nf4",
    "PeftAdapter",
    "Prefix",
    "Prompt",
    "Prune",
    "Select",
    "TrainableTokens",
    "Vera",
]
