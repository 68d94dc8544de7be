"""Methods of parameter-efficient fine-tuning, one pass per file."""

from passes.lora import Lora as Lora

__all__ = ["Lora"]
