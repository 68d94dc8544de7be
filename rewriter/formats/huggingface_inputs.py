"""Example inputs for a transformers model, made up from its configuration and the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim

from rewriter.errors import RewriteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KNOWN = ("input_ids", "pixel_values", "input_features", "input_values")
LENGTH_LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions")
# Room below the limit: some position embeddings start counting after the padding token.
POSITION_OFFSET = 2


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Keyword inputs that run through `model`, by name: tokens, masks, images or audio features.

    Every batch has at least two rows and, as far as the model allows, no size equals another one or a size of the
    model, so that `torch.export` cannot take two of them for one. Raises `RewriteError` for a model whose main input
    is none of these.
    """
    made = _Maker(model)
    names = set(inspect.signature(model.forward).parameters)
    wanted = {model.main_input_name}
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        wanted = {"input_ids", "pixel_values"}  # two encoders side by side, each with its own batch
    if not wanted <= {*KNOWN} & names:
        raise RewriteError(
            f"no example inputs can be made up for {type(model).__name__}",
            evidence=[f"its main input is {model.main_input_name!r}; known are {', '.join(KNOWN)}"],
            fix="Give example inputs yourself.",
        )
    inputs: dict[str, torch.Tensor] = {}
    if "input_ids" in wanted:
        inputs |= made.text(names)
    if "pixel_values" in wanted:
        inputs["pixel_values"] = made.image(alone="input_ids" not in wanted)
    if "input_features" in wanted:
        inputs["input_features"] = made.features()
    if "input_values" in wanted:
        inputs["input_values"] = made.signal()
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = made.tokens()
    return inputs


def varying_sizes(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """For `torch.export`: every size of the inputs may vary, but not those of images that the configuration fixes."""
    vision = getattr(model.config, "vision_config", model.config)
    fixed = {"pixel_values"} if getattr(vision, "image_size", None) is not None else set()
    return {
        name: dict.fromkeys(range(1 if name in fixed else tensor.ndim), Dim.AUTO) for name, tensor in inputs.items()
    }


class _Maker:
    """Draws sizes that nothing else in the model has, and random values of those sizes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.settings = list(_settings(model.config.to_dict()))
        self.taken = {value for _, value in self.settings}
        self.taken |= {size for parameter in model.parameters() for size in parameter.shape}
        self.generator = torch.Generator().manual_seed(0)
        self.batch = self.size(2)

    def size(self, at_least: int, at_most: int | None = None) -> int:
        found = at_least
        while found in self.taken:
            found += 1
        if at_most is not None and found > at_most:
            found = max(at_most, 1)
        self.taken.add(found)
        return found

    def text(self, names: set[str]) -> dict[str, torch.Tensor]:
        ids = self.tokens()
        inputs = {"input_ids": ids}
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones_like(ids)
        # Decoders such as GPT-2 take token types too, but only encoders trained with them say how many there are.
        types = self._setting("type_vocab_size", 0)
        if "token_type_ids" in names and types > 1:
            inputs["token_type_ids"] = self._randint(types, tuple(ids.shape))
        return inputs

    def tokens(self) -> torch.Tensor:
        """Random ordinary tokens with the end token last, as a tokenizer gives them: [batch, length]."""
        limits = [value for key, value in self.settings if key in LENGTH_LIMITS and value > POSITION_OFFSET]
        length = self.size(5, min(limits) - POSITION_OFFSET if limits else None)
        vocabulary = self._setting("vocab_size", None)
        special = {value for key, value in self.settings if key.endswith(("token_id", "token_index"))}
        ordinary = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
        ids = ordinary[self._randint(len(ordinary), (self.batch, length))]
        end = self._setting("eos_token_id", None)
        if isinstance(end, int) and 0 <= end < vocabulary and end != self._setting("pad_token_id", None):
            ids[:, -1] = end
        return ids.to(self.model.device)

    def image(self, *, alone: bool) -> torch.Tensor:
        """Random images: [batch, channels, height, width]; the batch is another one than that of a text beside it."""
        config = getattr(self.config, "vision_config", self.config)
        side = getattr(config, "image_size", None)
        if side is None:
            height, width = self.size(64), self.size(64)  # a model without a fixed size takes any
        else:
            sides = list(side.values()) if isinstance(side, Mapping) else side
            height, width = (sides, sides) if isinstance(sides, int) else (sides[0], sides[-1])
        batch = self.batch if alone else self.size(2)
        return self._noise(batch, getattr(config, "num_channels", 3), height, width)

    def features(self) -> torch.Tensor:
        """Random spectrograms: [batch, bands, 2 * positions] where the length is fixed, else [batch, length, bands]."""
        bands, positions = self._setting("num_mel_bins", None), self._setting("max_source_positions", None)
        if bands is not None and positions is not None:
            return self._noise(self.batch, bands, 2 * positions)
        for name in ("input_feat_per_channel", "feature_projection_input_dim", "feature_size", "num_mel_bins"):
            if (bands := self._setting(name, None)) is not None:
                return self._noise(self.batch, self.size(60), bands)
        raise RewriteError(
            f"the configuration of {type(self.model).__name__} does not say how wide its input features are",
            fix="Give example inputs yourself.",
        )

    def signal(self) -> torch.Tensor:
        """Random sound: [batch, samples], or [batch, length, bands] where the configuration fixes both."""
        bands, length = self._setting("num_mel_bins", None), self._setting("max_length", None)
        if bands is not None and length is not None:
            return self._noise(self.batch, length, bands)
        return self._noise(self.batch, self.size(4000))

    def _setting(self, name: str, default: Any) -> Any:
        for config in (self.config, self.config.get_text_config(), self.config.get_text_config(decoder=True)):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        return default

    def _randint(self, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.model.device, self.model.dtype)


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of a configuration with its key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _settings(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _settings(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
