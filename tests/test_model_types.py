"""Every claimed model type, measured on a tiny random model of the real class, equals the table in `results`.

`python tests/test_model_types.py` writes the table anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from spath_eval import Architecture
from spath_eval.masks import keep_all, remove_experts, remove_lowest
from spath_eval.pathways import StaticPathway, check_parity
from spath_eval.registry import Registry
from spath_eval.sites import Observation, Site
from spath_eval.texts import Batch

TABLE = Path(__file__).parents[1] / "results" / "model_types.md"
LIMIT = 1e-5
HEADER = """\
# Model types

Every model type that a family claims, on a tiny randomly initialised model of the real transformers class (float32, on
a CPU). *Keep-all*: the largest change of a logit where every neuron is kept, masked or compact. *Parity*: the largest
difference at a site of compact from masked execution on identical inputs, where half of the neurons go and of routed
experts a quarter, too. *Observation*: the largest difference of an observed activation from a float64 computation over
the raw weights. The last two are relative to the largest value there, and given as an upper bound.

Made, and compared in every test run, by `tests/test_model_types.py`.

| Family | Model type | Sites | Shapes | Keep-all | Parity | Observation |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What is known of a model type or a variant of it."""

    family: str
    kind: str
    sites: int
    shapes: str
    keep_all: float
    parity: float
    observation: float

    def exact(self) -> list[str]:
        """The cells that are the same on every machine."""
        model_type, _, variant = self.kind.partition("+")
        name = f"{model_type} with {variant}" if variant else model_type
        return [self.family, name, str(self.sites), self.shapes, f"{self.keep_all:g}"]

    def cells(self) -> list[str]:
        """All cells, errors rounded up to a power of ten, and to what float32 resolves."""
        errors = [
            f"< {10.0 ** math.ceil(math.log10(max(error, 1e-7))):.0e}" for error in (self.parity, self.observation)
        ]
        return self.exact() + errors


Reference = Callable[..., np.ndarray]


def measure(family: Architecture, kind: str, model: PreTrainedModel, reference: Reference) -> Row:
    """The row of a model. `reference` computes activations of an FFN in float64."""
    sites = family.sites(model)
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    everything = torch.ones_like(tokens)
    probe = Batch(tokens, everything, everything.bool(), (0, 1))
    generator = torch.Generator().manual_seed(2)
    shapes = {site.path: (site.width,) if site.experts is None else (site.experts, site.width) for site in sites}
    mask = remove_lowest({path: torch.rand(shape, generator=generator) for path, shape in shapes.items()}, 0.5)
    routed = {site.path: torch.rand(site.experts, generator=generator) for site in sites if site.experts}
    if routed:
        mask = remove_experts(mask, routed, 0.25)

    dense = logits(model, tokens)
    differences = []
    for execution in ("masked", "compact"):
        with StaticPathway(sites, keep_all(sites), execution).applied():
            differences.append(float((logits(model, tokens) - dense).abs().max()))
    parity = check_parity(model, StaticPathway(sites, mask, "compact"), probe)["max_relative_difference"]
    found = Counter(site.ffn.shape for site in sites)
    names = ", ".join(f"{count} {shape}" for shape, count in sorted(found.items()))
    observation = max(observation_errors(model, sites, tokens, reference).values())
    return Row(family.name, kind, len(sites), names, max(differences), parity, observation)


def observation_errors(
    model: PreTrainedModel, sites: list[Site], tokens: torch.Tensor, reference: Reference
) -> dict[str, float]:
    """For each site, how far what is observed is from `reference`, relative to the largest activation."""
    inputs: dict[str, torch.Tensor] = {}
    observed: dict[str, Observation] = {}
    with ExitStack() as stack:
        for site in sites:
            hook = lambda _, given, path=site.path: inputs.update({path: given[0]})  # noqa: E731
            stack.callback(site.module.register_forward_pre_hook(hook).remove)
            stack.enter_context(site.observe(lambda seen, path=site.path: observed.update({path: seen})))
        logits(model, tokens)
    errors = {}
    for site in sites:
        seen = observed[site.path]
        rows = inputs[site.path].reshape(-1, inputs[site.path].shape[-1])[seen.tokens]
        expected = reference(site.module, rows, *([] if seen.experts is None else [seen.experts]))
        errors[site.path] = float(np.abs(seen.values.double().numpy() - expected).max() / np.abs(expected).max())
    return errors


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits


def kinds_of(family: Architecture, kinds: Mapping[str, object] | tuple[str, ...]) -> list[str]:
    """The tiny models that stand for a family's types, in the order of its declaration."""
    return [kind for model_type in family.model_types for kind in kinds if kind.partition("+")[0] == model_type]


def written_rows() -> list[list[str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]


def test_every_claimed_model_type_has_a_tiny_model(tiny_model):
    known = {kind.partition("+")[0] for kind in tiny_model.kinds}
    for family in Registry.load().architectures.values():
        missing = [model_type for model_type in family.model_types if model_type not in known]
        assert not missing, (
            f"{family.name} claims {', '.join(missing)}, which nothing proves: add a configuration of it to TINY in "
            "tests/conftest.py, and write the table anew by python tests/test_model_types.py"
        )


@pytest.fixture(scope="module")
def rows(tiny_model, reference_activations):
    families = Registry.load().architectures.values()
    return [
        measure(family, kind, tiny_model(kind), reference_activations)
        for family in families
        for kind in kinds_of(family, tiny_model.kinds)
    ]


def test_the_table_is_that_of_the_models_as_they_are(rows):
    assert [row.exact() for row in rows] == [cells[:5] for cells in written_rows()], (
        "results/model_types.md is out of date: python tests/test_model_types.py writes it anew"
    )


def test_keep_all_is_exact_and_errors_are_small(rows):
    for row in rows:
        assert row.keep_all == 0, row
        assert row.parity < LIMIT, row
        assert row.observation < LIMIT, row
    assert all(0 < float(cell.removeprefix("< ")) <= LIMIT for cells in written_rows() for cell in cells[5:])


def main() -> None:
    """Write the table."""
    from conftest import TINY, build_tiny_model, float64_activations

    torch.set_num_threads(1)
    families = Registry.load().architectures.values()
    rows = [
        measure(family, kind, build_tiny_model(kind), float64_activations)
        for family in families
        for kind in kinds_of(family, TINY)
    ]
    lines = [f"| {' | '.join(row.cells())} |" for row in rows]
    TABLE.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
