"""Small models of every shape that matters, with random weights, and their traces.

Sizes are pairwise different wherever the architecture allows it: torch.export takes two equal sizes for one, and a
mistake that swaps two dimensions must not stay unseen. Every parameter is random and none is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.program import Program
from rewriter.trace import trace

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a random value of a healthy size; the module is in eval mode after."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * noise)
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.running_mean.copy_(0.3 * torch.randn(child.num_features, generator=generator))
                child.running_var.copy_(0.5 + torch.rand(child.num_features, generator=generator))
    return module.eval()


class Perceptron(nn.Module):
    """Two linear layers, a norm between them, dropout, and a residual connection; one positional input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 22)
        self.norm = nn.LayerNorm(22)
        self.dropout = nn.Dropout(0.5)
        self.down = nn.Linear(22, 10, bias=False)
        self.head = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.relu(self.up(x)))
        return self.head(x + self.down(self.dropout(hidden)))


class Convolutional(nn.Module):
    """Images and a signal: Conv2d with batch norm, a grouped and a strided one, Conv1d, and an embedding added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), padding=(1, 2))
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=4, bias=False)
        self.signal = nn.Conv1d(12, 14, 3, dilation=2)
        self.classes = nn.Embedding(9, 14)
        self.head = nn.Linear(14, 6)

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(image)))
        x = self.signal(torch.relu(self.grouped(x)).flatten(2))
        pooled = x.mean(dim=-1) + self.classes(label)
        return {"score": self.head(pooled), "pooled": pooled}


def _ids(vocabulary: int, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _mask(batch: int, length: int) -> Tensor:
    """Ones, with the last two tokens of the last row padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def _decoder(module: nn.Module, vocabulary: int, batch: int = 3, length: int = 7) -> Example:
    inputs = {"input_ids": _ids(vocabulary, batch, length), "attention_mask": _mask(batch, length), "use_cache": False}
    return randomise(module), (), inputs


def llama_config(**changes: Any) -> Any:
    """Grouped-query attention: 4 query heads, 2 key and value heads, width 24."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 31,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**sizes, **changes})


def llama(**changes: Any) -> Example:
    from transformers import LlamaForCausalLM

    return _decoder(LlamaForCausalLM(llama_config(**changes)), 31)


def llama_tied() -> Example:
    return llama(tie_word_embeddings=True)


def gpt2() -> Example:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=37, n_positions=43, n_embd=24, n_layer=2, n_head=4, n_inner=52, bos_token_id=1, eos_token_id=2
    )
    return _decoder(GPT2LMHeadModel(config), 37)


def opt() -> Example:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        ffn_dim=52,
        num_attention_heads=4,
        max_position_embeddings=43,
        word_embed_proj_dim=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _decoder(OPTForCausalLM(config), 37)


def phi3() -> Example:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _decoder(Phi3ForCausalLM(config), 31)


def mixtral() -> Example:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _decoder(MixtralForCausalLM(config), 31)


def bert() -> Example:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=52,
        max_position_embeddings=43,
        type_vocab_size=2,
    )
    mask = _mask(3, 7)
    inputs = {"input_ids": _ids(37, 3, 7), "attention_mask": mask, "token_type_ids": (_ids(37, 3, 7, 1) % 2) * mask}
    return randomise(BertModel(config)), (), inputs


def t5() -> Example:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=37,
        d_model=24,
        d_kv=10,
        d_ff=52,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=17,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    inputs = {
        "input_ids": _ids(37, 3, 7),
        "attention_mask": _mask(3, 7),
        "decoder_input_ids": _ids(37, 3, 5, 1),
        "use_cache": False,
    }
    return randomise(T5ForConditionalGeneration(config)), (), inputs


def whisper() -> Example:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=37,
        num_mel_bins=11,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=52,
        decoder_ffn_dim=52,
        max_source_positions=13,
        max_target_positions=43,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": _noise(3, 11, 26), "decoder_input_ids": _ids(37, 3, 5), "use_cache": False}
    return randomise(WhisperForConditionalGeneration(config)), (), inputs


def vit() -> Example:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=52,
        image_size=18,
        patch_size=6,
        num_channels=5,
        num_labels=7,
    )
    return randomise(ViTForImageClassification(config)), (), {"pixel_values": _noise(3, 5, 18, 18)}


def clip() -> Example:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={
            "vocab_size": 37,
            "hidden_size": 24,
            "intermediate_size": 52,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 43,
            "eos_token_id": 2,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "image_size": 18,
            "patch_size": 6,
        },
        projection_dim=20,
    )
    inputs = {"input_ids": _ids(37, 3, 7), "pixel_values": _noise(5, 3, 18, 18), "attention_mask": _mask(3, 7)}
    return randomise(CLIPModel(config)), (), inputs


def mlp() -> Example:
    return randomise(Perceptron()), (_noise(3, 5, 10),), {}


def conv() -> Example:
    return randomise(Convolutional()), (_noise(2, 3, 11, 17), torch.tensor([8, 4])), {}


TINY: dict[str, Callable[[], Example]] = {
    "llama": llama,
    "llama_tied": llama_tied,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "phi3": phi3,
    "opt": opt,
    "whisper": whisper,
    "clip": clip,
    "mixtral": mixtral,
    "mlp": mlp,
    "conv": conv,
}


@functools.cache
def traced(name: str) -> Program:
    """The trace of a model of `TINY`. It is shared by all tests: programs are values, nobody changes one."""
    module, args, kwargs = TINY[name]()
    return trace(module, args, kwargs)
