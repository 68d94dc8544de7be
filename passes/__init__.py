"""Methods of parameter-efficient fine-tuning, one pass per file."""

from passes.lora import Lora as Lora
from passes.merge import Merge as Merge

__all__ = ["Lora", "Merge"]
