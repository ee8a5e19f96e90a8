"""One decoder layer at a published model's dimensions, with random weights: real speed without a download.

Matrix products take as long on random weights as on trained ones. The vocabulary is cut to 256, so that embeddings
and output head do not count; the class is the family's own in transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from spath_eval.contracts import ReferenceShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 256
"""Tokens that a model of `one_layer` knows."""


def subject(shape: ReferenceShape) -> str:
    """What a record calls that measurement."""
    return f"one layer of {shape.name}, random weights"


def one_layer(
    shape: ReferenceShape, *, device: str | torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A causal language model of `shape` with its first layer only, in evaluation mode.

    Weights are uniform with the standard deviation the family starts training with; norm weights are 1.
    """
    config = AutoConfig.for_model(**_one_layer_config(shape))
    # The library's own initialisation takes seconds for a hundred million weights.
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(seed)
    bound = 3**0.5 * getattr(config, "initializer_range", 0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):
                parameter.fill_(1.0)
            else:
                parameter.uniform_(-bound, bound, generator=generator)
    return model.eval()


def _one_layer_config(shape: ReferenceShape) -> dict[str, Any]:
    """The shape's configuration with every list that has one entry per layer cut to the first."""
    whole = AutoConfig.for_model(**shape.config).to_dict()
    layers = whole["num_hidden_layers"]
    one = {
        key: value[:1] if isinstance(value, list) and len(value) == layers else value for key, value in whole.items()
    }
    one |= {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
    # Ids beyond the cut vocabulary are refused by the embedding.
    one |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if "vocab_size_per_layer_input" in one:
        one["vocab_size_per_layer_input"] = VOCABULARY
    if "num_kv_shared_layers" in one:
        one["num_kv_shared_layers"] = 0
    return one
