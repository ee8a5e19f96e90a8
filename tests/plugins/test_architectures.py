"""The families: which configurations they claim, and the published models they time."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spath_eval import UsageError
from spath_eval.models import find_architecture
from spath_eval.registry import Registry


@pytest.fixture(scope="module")
def registry():
    return Registry.load()


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text", "gemma3n_text"])
@pytest.mark.parametrize("name", ["auto", "gemma"])
def test_gemma_claims_its_four_model_types(registry, model_type, name):
    assert find_architecture(registry, AutoConfig.for_model(model_type), name).name == "gemma"


def test_a_model_type_that_nobody_claims_lists_what_is_supported_and_how_to_register_one(registry):
    with pytest.raises(UsageError) as caught:
        find_architecture(registry, AutoConfig.for_model("bert"), "auto")
    message = str(caught.value)
    assert "no architecture claims model type 'bert'" in message
    assert "gemma: gemma, gemma2, gemma3_text, gemma3n_text" in message
    assert "spath_register_architectures" in message
    assert "\n" not in message


def test_a_family_asked_for_by_name_must_claim_the_model(registry):
    with pytest.raises(UsageError, match=r"'gemma' does not claim model type 'bert' \(it claims gemma, .*--arch auto"):
        find_architecture(registry, AutoConfig.for_model("bert"), "gemma")


def test_an_unknown_family_lists_those_there_are(registry):
    with pytest.raises(UsageError, match=r"unknown architecture 'gema'.*gemma.*Did you mean gemma\?"):
        find_architecture(registry, AutoConfig.for_model("gemma"), "gema")


def test_reference_shape_is_the_published_gemma_2b(registry):
    (shape,) = registry.architecture("gemma").reference_shapes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config))
    assert shape.name == "gemma-2b"
    # of which 524,550,144 are embedding parameters (Gemma report, table 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_506_172_416
    assert [site.width for site in registry.architecture("gemma").sites(model)] == [16384] * 18
