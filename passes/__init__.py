"""Methods of parameter-efficient fine-tuning, one pass per file."""

from passes.adalora import Adalora as Adalora
from passes.adapter import Adapter as Adapter
from passes.compose import Compose as Compose
from passes.ia3 import Ia3 as Ia3
from passes.layer_norm_tuning import LayerNormTuning as LayerNormTuning
from passes.loha import Loha as Loha
from passes.lokr import Lokr as Lokr
from passes.lora import Lora as Lora
from passes.merge import Merge as Merge
from passes.peft import PeftAdapter as PeftAdapter
from passes.prune import Prune as Prune
from passes.trainable_tokens import TrainableTokens as TrainableTokens
from passes.vera import Vera as Vera

__all__ = [
    "Adalora",
    "Adapter",
    "Compose",
    "Ia3",
    "LayerNormTuning",
    "Loha",
    "Lokr",
    "Lora",
    "Merge",
    "PeftAdapter",
    "Prune",
    "TrainableTokens",
    "Vera",
]
