"""The configurations of PEFT's methods other than LoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rewriter.formats.peft_targets import (
    NEUTRAL,
    AdapterConfig,
    Alpha,
    Names,
    Probability,
    Rank,
    RankedConfig,
    TargetedConfig,
    named,
)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


class Ia3Config(TargetedConfig):
    """(IA)³: `feedforward_modules` are scaled in what they read, the other targets in what they give."""

    peft_type = "IA3"
    endings = _same("ia3_l")

    feedforward_modules: Names | None = None
    fan_in_fan_out: bool = False  # a layer itself tells how it stores its weight
    init_ia3_weights: bool = True

    def is_feedforward(self, path: str) -> bool:
        return named(self.feedforward_modules, path)


class _LycorisConfig(RankedConfig):
    """What LoHa and LoKr share. Their dropouts leave out whole updates in training and nothing afterwards."""

    neutral = NEUTRAL | {"rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"}

    alpha: Alpha = 8
    use_effective_conv2d: bool = False

    @property
    def default_alpha(self) -> float:
        return self.alpha


class LohaConfig(_LycorisConfig):
    """LoHa."""

    peft_type = "LOHA"
    endings = _same("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


class LokrConfig(_LycorisConfig):
    """LoKr."""

    peft_type = "LOKR"
    endings = _same("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    decompose_both: bool = False
    decompose_factor: int = -1


class VeraConfig(TargetedConfig):
    """VeRA: one frozen pair of random matrices for the whole model."""

    peft_type = "VERA"
    endings = _same("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")
    root = frozenset({"vera_A", "vera_B"})
    neutral = NEUTRAL | {"init_weights", "fan_in_fan_out"}

    r: Rank = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    vera_dropout: Probability = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"


class AdaLoraConfig(TargetedConfig):
    """AdaLoRA: LoRA as a singular value decomposition whose ranks were pruned in training.

    `rank_pattern` says of every `<module>.lora_E` which of the `init_r` singular values were left.
    """

    peft_type = "ADALORA"
    endings = _same("lora_A", "lora_B", "lora_E")
    neutral = NEUTRAL | {
        "beta1",
        "beta2",
        "corda_config",
        "deltaT",
        "eva_config",
        "init_lora_weights",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "orth_reg_weight",
        "qalora_group_size",
        "r",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "velora_config",
        "fan_in_fan_out",
        "use_rslora",  # PEFT's AdaLoRA does not read it
    }
    refused = frozenset(
        {
            "alora_invocation_tokens",
            "alpha_pattern",
            "arrow_config",
            "ensure_weight_tying",
            "kasa_config",
            "layer_replication",
            "lora_bias",
            "megatron_config",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_dora",
            "use_qalora",
        }
    )

    init_r: Rank = 12
    lora_alpha: Alpha = 8
    lora_dropout: Probability = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: Annotated[dict[str, list[bool]], BeforeValidator(lambda value: value or {})] = Field(
        default_factory=dict
    )


class LayerNormConfig(TargetedConfig):
    """LayerNorm tuning: whole norms, saved under their own names."""

    peft_type = "LN_TUNING"
    endings = _same()


class TrainableTokensConfig(TargetedConfig):
    """Trainable tokens: the new rows of an embedding."""

    peft_type = "TRAINABLE_TOKENS"
    endings = _same("trainable_tokens_delta")
    neutral = NEUTRAL | {"init_weights"}

    token_indices: Annotated[list[int], Field(min_length=1)]


class PromptLearningConfig(AdapterConfig):
    """What prefix tuning, prompt tuning and P-tuning share: one table, whose encoder PEFT never saves."""

    endings = _same("prompt_embeddings")
    root = frozenset({"prompt_embeddings"})
    neutral = NEUTRAL | {"init_weights"}

    num_virtual_tokens: Rank
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None


class PrefixConfig(PromptLearningConfig):
    """Prefix tuning; the saved table is what the projection gave."""

    peft_type = "PREFIX_TUNING"

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


class PromptConfig(PromptLearningConfig):
    """Prompt tuning."""

    peft_type = "PROMPT_TUNING"
    neutral = NEUTRAL | {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }


class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning; the saved table is what the encoder gave."""

    peft_type = "P_TUNING"
    neutral = NEUTRAL | {
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    }


METHODS: dict[str, type[AdapterConfig]] = {
    config.peft_type: config
    for config in (
        Ia3Config,
        LohaConfig,
        LokrConfig,
        VeraConfig,
        AdaLoraConfig,
        LayerNormConfig,
        TrainableTokensConfig,
        PrefixConfig,
        PromptConfig,
        PromptEncoderConfig,
    )
}
