"""Methods of parameter-efficient fine-tuning, one pass per file."""

from passes.lora import Lora as Lora
from passes.merge import Merge as Merge
from passes.peft import PeftAdapter as PeftAdapter

__all__ = ["Lora", "Merge", "PeftAdapter"]
