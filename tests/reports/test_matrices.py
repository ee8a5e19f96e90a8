"""Matrices and leagues: the figures of cases side by side, and only such verdicts as paired comparisons bear out."""

import copy
import itertools
import re
from pathlib import Path

import pytest

from spath_eval import records
from spath_eval.reports.console import ConsoleReport
from spath_eval.reports.matrices import holm
from spath_eval.reports.tables import short

DOMAINS = ("math", "code", "language")
RATIOS = {
    "math": (1.1, 1.5, 1.6),
    "code": (1.4, 1.2, 1.5),
    "language": (1.4, 1.6, 1.3),
    "pooled": (1.16, 1.1, 1.36),
}
"""Of a domain's mask, on each domain."""


@pytest.fixture
def example():
    return records.read(Path(__file__).parents[1] / "data" / "record.json")


@pytest.fixture
def crossed(example):
    """A cross-domain run: every mask on every domain, each own mask compared with each other one."""
    cases = [
        case(example, mask, domain, "negative", 0.15, ratio)
        for mask, ratios in RATIOS.items()
        for domain, ratio in zip(DOMAINS, ratios, strict=True)
    ]
    example["cases"] = cases
    example["comparisons"] = [
        compared
        for own, other in itertools.product(cases, cases)
        if own["evaluated_on"] == own["domain"] == other["evaluated_on"] != other["domain"]
        for compared in comparisons(own, other, 0.0005)
    ]
    records.validate(example)
    return example


@pytest.fixture
def raced(example):
    """Three strategies and a control at two sparsities, in two domains, every pair compared."""
    ratios = {"negative": 1.2, "random": 1300.0, "wanda": 1.12, "specialisation": 2.4}
    example["cases"] = [
        case(example, domain, domain, strategy, sparsity, ratio * (1 + sparsity), control=strategy == "random")
        for domain in ("math", "code")
        for sparsity in (0.15, 0.3)
        for strategy, ratio in ratios.items()
    ]
    compare_all(example)
    records.validate(example)
    return example


def case(example, mask, domain, strategy, sparsity, ratio, control=False):
    """A case whose tasks both retain 1 - (ratio - 1) / 2."""
    made = copy.deepcopy(example["cases"][0])
    place = mask if mask == domain else f"{mask}>{domain}"
    made.update(id=f"gemma/{place}/{strategy}@{sparsity:g}", domain=mask, evaluated_on=domain, speed_reason="none")
    made["speed"] = []
    made["sparsity"]["requested"] = sparsity
    made["strategy"] = {"name": strategy, "options": {}, "kind": "static", "control": control}
    dense = made["preservation"]["perplexity"]["dense"]
    interval = [0.98 * ratio, 1.02 * ratio]
    made["preservation"]["perplexity"] = {"dense": dense, "sparse": dense * ratio, "ratio": ratio, "ci95": interval}
    for entry in made["quality"]:
        kept = retention(ratio)
        entry["retention"] = {"value": kept, "ci95": [kept - 0.04, kept + 0.04]}
    return made


def retention(ratio):
    return max(0.0, 1 - (ratio - 1) / 2)


def comparisons(first, second, p_value):
    """What the record says of two cases."""
    one, other = (found["preservation"]["perplexity"]["ratio"] for found in (first, second))
    about = {"model": "gemma", "evaluated_on": first["evaluated_on"], "sparsity": first["sparsity"]["requested"]}
    about |= {"case": first["id"], "other": second["id"], "p_value": p_value}
    difference = retention(one) - retention(other)
    yield about | {"quantity": "perplexity", "value": one / other, "ci95": [0.9 * one / other, 1.1 * one / other]}
    yield about | {"quantity": "retention", "value": difference, "ci95": [difference - 0.1, difference + 0.1]}


def compare_all(record):
    record["comparisons"] = [
        compared
        for first, second in itertools.combinations(record["cases"], 2)
        if first["domain"] == second["domain"] and first["sparsity"] == second["sparsity"]
        for compared in comparisons(first, second, 0.0005)
    ]


def render(record, **options):
    return ConsoleReport().render(record, **options)


def section(text, title):
    """The lines from a title to the next one."""
    lines = text.splitlines()
    start = lines.index(title)
    ends = (end for end in range(start + 1, len(lines)) if re.match(r"Across|League|Speed of|\(1\)|reten", lines[end]))
    return [line for line in lines[start : next(ends, len(lines))] if line]


def of_pair(record, quantity, *ids):
    """The comparison of two cases."""
    (found,) = (
        entry
        for entry in record["comparisons"]
        if entry["quantity"] == quantity and {entry["case"], entry["other"]} == {f"gemma/{id}" for id in ids}
    )
    return found


def test_each_mask_is_shown_on_each_domain_the_pooled_one_last(crossed):
    crossed["cases"] = crossed["cases"][-3:] + crossed["cases"][:-3]  # whatever the order of the cases
    text = render(crossed)
    assert section(text, "Across domains, gemma, negative@0.15: perplexity ratio [95%]")[1:] == [
        "mask of                on math               on code           on language",
        "--------  --------------------  --------------------  --------------------",
        "math      1.100 [1.078, 1.122]  1.500 [1.470, 1.530]  1.600 [1.568, 1.632]",
        "code      1.400 [1.372, 1.428]  1.200 [1.176, 1.224]  1.500 [1.470, 1.530]",
        "language  1.400 [1.372, 1.428]  1.600 [1.568, 1.632]  1.300 [1.274, 1.326]",
        "pooled    1.160 [1.137, 1.183]  1.100 [1.078, 1.122]  1.360 [1.333, 1.387]",
        "own mask below the others: 6 of 6 cells, 6 of them significantly",
        "own mask below the pooled one: 2 of 3 cells, 2 of them significantly; significantly worse in 1",
    ]
    # two tasks with an interval of 0.04 either way: their mean has one of 0.04 / sqrt(2)
    assert section(text, "Across domains, gemma, negative@0.15: mean retention [95%]")[3:] == [
        "math      0.95 [0.92, 0.98]  0.75 [0.72, 0.78]  0.70 [0.67, 0.73]",
        "code      0.80 [0.77, 0.83]  0.90 [0.87, 0.93]  0.75 [0.72, 0.78]",
        "language  0.80 [0.77, 0.83]  0.70 [0.67, 0.73]  0.85 [0.82, 0.88]",
        "pooled    0.92 [0.89, 0.95]  0.95 [0.92, 0.98]  0.82 [0.79, 0.85]",
        "own mask above the others: 6 of 6 cells, 6 of them significantly",
        "own mask above the pooled one: 2 of 3 cells, 2 of them significantly; significantly worse in 1",
    ]
    assert "significantly: " in text
    assert "League" not in text


def perplexity_verdicts(record):
    text = render(record)
    return section(text, "Across domains, gemma, negative@0.15: perplexity ratio [95%]")[-2:]


def test_own_masks_are_judged_by_adjusted_p_values(crossed):
    for entry in crossed["comparisons"]:
        entry["p_value"] = 0.03  # of nine comparisons: 0.27
    of_pair(crossed, "perplexity", "math/negative@0.15", "code>math/negative@0.15")["p_value"] = 0.0055  # 0.0495
    assert perplexity_verdicts(crossed) == [
        "own mask below the others: 6 of 6 cells, 1 of them significantly",
        "own mask below the pooled one: 2 of 3 cells, 0 of them significantly",
    ]
    of_pair(crossed, "perplexity", "math/negative@0.15", "code>math/negative@0.15")["p_value"] = 0.0056  # 0.0504
    assert perplexity_verdicts(crossed)[0].endswith("6 of 6 cells, 0 of them significantly")


def test_a_comparison_counts_either_way_round(crossed):
    expected = perplexity_verdicts(crossed)
    for entry in crossed["comparisons"]:
        value = 1 / entry["value"] if entry["quantity"] == "perplexity" else -entry["value"]
        entry.update(case=entry["other"], other=entry["case"], value=value)
    assert perplexity_verdicts(crossed) == expected


def test_cells_that_were_not_compared_are_not_called_significant(crossed):
    crossed["comparisons"].remove(of_pair(crossed, "perplexity", "math/negative@0.15", "code>math/negative@0.15"))
    of_pair(crossed, "perplexity", "math/negative@0.15", "language>math/negative@0.15").update(
        value=None, ci95=None, p_value=None, reason="for a test"
    )
    assert perplexity_verdicts(crossed)[0] == (
        "own mask below the others: 6 of 6 cells, 4 of them significantly (4 cells compared in pairs)"
    )
    del crossed["comparisons"]
    assert perplexity_verdicts(crossed) == [
        "own mask below the others: 6 of 6 cells, not compared in pairs",
        "own mask below the pooled one: 2 of 3 cells, not compared in pairs",
    ]


def test_a_mask_that_failed_on_a_domain_leaves_a_cell_that_says_so(crossed):
    failed = next(case for case in crossed["cases"] if case["id"] == "gemma/math>code/negative@0.15")
    for field in ("preservation", "quality", "sparsity"):
        del failed[field]
    failed.update(outcome="failed", message="mask not applied")
    text = render(crossed)
    rows = section(text, "Across domains, gemma, negative@0.15: perplexity ratio [95%]")
    assert rows[3] == "math      1.100 [1.078, 1.122]                failed  1.600 [1.568, 1.632]"
    assert rows[-2] == "own mask below the others: 5 of 5 cells, 5 of them significantly"
    assert "math>code/negative@0.15  FAILED: mask not applied" in text


def test_strategies_and_sparsities_have_matrices_of_their_own(crossed):
    further = copy.deepcopy(crossed["cases"])
    for one in further:
        one["id"] = one["id"].replace("negative@0.15", "negative:pool=model@0.3")
        one["quality"] = []
    crossed["cases"] += further
    titles = [line for line in render(crossed).splitlines() if line.startswith("Across")]
    assert titles == [
        "Across domains, gemma, negative@0.15: perplexity ratio [95%]",
        "Across domains, gemma, negative@0.15: mean retention [95%]",
        "Across domains, gemma, negative:pool=model@0.3: perplexity ratio [95%]",
    ]


def test_the_quality_table_is_of_own_masks_and_the_preservation_table_of_all(crossed):
    text = render(crossed)
    assert re.findall(r"^(\S+)  sparsity", text, flags=re.MULTILINE) == [f"{name}/negative@0.15" for name in DOMAINS]
    assert "Masks on domains that are not theirs: in the matrices below; task by task in the record." in text
    lines = section(text, "Output preservation of gemma")
    assert lines[3:5] == [
        "math/negative@0.15",
        "  on math        5000       3.41        3.75  1.100 [1.078, 1.122]   0.993  0.021  0.951",
    ]
    assert [line.split()[0] for line in lines[3:]] == [
        word for mask in RATIOS for word in (f"{mask}/negative@0.15", "on", "on", "on")
    ]


def test_a_mask_is_timed_once(crossed, example):
    timed = copy.deepcopy(records.read(Path(__file__).parents[1] / "data" / "record.json")["cases"][0]["speed"][:1])
    for one in crossed["cases"]:
        one["speed_reason"] = "the same pathway as in another case"
    first_of_mask = {one["domain"]: one for one in reversed(crossed["cases"])}
    for one in first_of_mask.values():
        one["speed"] = timed
        del one["speed_reason"]
    lines = section(render(crossed), "Speed of gemma")
    assert [line.split()[0] for line in lines[4:]] == [
        "math/negative@0.15",
        "code>math/negative@0.15",
        "language>math/negative@0.15",
        "pooled>math/negative@0.15",
    ]


def test_a_league_sets_strategies_beside_each_other_and_stars_the_best(raced):
    text = render(raced)
    assert section(text, "League of gemma: perplexity ratio [95%]")[1:] == [
        "  strategy                         math                   code",
        "  --------------  ---------------------  ---------------------",
        "sparsity 0.15",
        "  negative         1.380 [1.352, 1.408]   1.380 [1.352, 1.408]",
        "  wanda           *1.288 [1.262, 1.314]  *1.288 [1.262, 1.314]",
        "  specialisation   2.760 [2.705, 2.815]   2.760 [2.705, 2.815]",
        "  (random)         1.49k [1.47k, 1.52k]   1.49k [1.47k, 1.52k]",
        "sparsity 0.3",
        "  negative         1.560 [1.529, 1.591]   1.560 [1.529, 1.591]",
        "  wanda           *1.456 [1.427, 1.485]  *1.456 [1.427, 1.485]",
        "  specialisation   3.120 [3.058, 3.182]   3.120 [3.058, 3.182]",
        "  (random)         1.69k [1.66k, 1.72k]   1.69k [1.66k, 1.72k]",
    ]
    assert section(text, "League of gemma: mean retention [95%]")[4:6] == [
        "  negative         0.81 [0.78, 0.84]   0.81 [0.78, 0.84]",
        "  wanda           *0.86 [0.83, 0.88]  *0.86 [0.83, 0.88]",
    ]
    assert "*: the best of its domain and sparsity" in text


def stars(record):
    return [
        line.split()[0] for line in section(render(record), "League of gemma: perplexity ratio [95%]") if "*" in line
    ]


def test_the_best_has_no_star_unless_it_beats_every_rival_significantly(raced):
    raced["cases"] = [one for one in raced["cases"] if one["domain"] == "math" and one["id"].endswith("@0.15")]
    assert stars(raced) == ["wanda"]
    of_pair(raced, "perplexity", "math/wanda@0.15", "math/negative@0.15")["p_value"] = 0.049  # the largest of three
    assert stars(raced) == ["wanda"]
    of_pair(raced, "perplexity", "math/specialisation@0.15", "math/negative@0.15")["p_value"] = 0.06
    assert stars(raced) == []  # 0.049 is now the second of three: 0.098
    compare_all(raced)
    of_pair(raced, "perplexity", "math/wanda@0.15", "math/random@0.15")["p_value"] = 1.0
    assert stars(raced) == ["wanda"]  # a control does not compete
    raced["comparisons"].remove(of_pair(raced, "perplexity", "math/wanda@0.15", "math/specialisation@0.15"))
    assert stars(raced) == []


def test_a_rival_that_failed_leaves_the_race_open(raced):
    raced["cases"] = [one for one in raced["cases"] if one["domain"] == "math" and one["id"].endswith("@0.15")]
    failed = next(one for one in raced["cases"] if one["strategy"]["name"] == "specialisation")
    raced["comparisons"] = [entry for entry in raced["comparisons"] if failed["id"] not in entry.values()]
    for field in ("preservation", "quality", "sparsity"):
        del failed[field]
    failed.update(outcome="error", message="out of memory")
    assert stars(raced) == []
    lines = section(render(raced), "League of gemma: perplexity ratio [95%]")
    assert ["specialisation", "error"] in [line.split() for line in lines]


def test_a_strategy_alone_with_controls_makes_no_league(raced, example):
    raced["cases"] = [one for one in raced["cases"] if one["strategy"]["name"] in ("negative", "random")]
    assert "League" not in render(raced)
    for one in raced["cases"]:
        del one["strategy"]["control"]  # older records do not tell controls
    assert "League" not in render(raced)


def test_options_make_rivals_of_one_strategy(raced):
    raced["cases"] = [one for one in raced["cases"] if one["strategy"]["name"] == "negative"]
    for one in raced["cases"][::2]:
        one["id"] = one["id"].replace("negative@0.15", "negative:pool=model@0.3")
    lines = section(render(raced), "League of gemma: perplexity ratio [95%]")
    assert [line.split()[0] for line in lines[4:]] == ["negative:pool=model", "negative"]


def test_a_league_without_quality_is_of_preservation_only(raced):
    for one in raced["cases"]:
        one.update(quality=[], quality_reason="not asked for")
    titles = [line for line in render(raced).splitlines() if line.startswith("League")]
    assert titles == ["League of gemma: perplexity ratio [95%]"]


@pytest.mark.parametrize("width", range(60, 101, 8))
@pytest.mark.parametrize("run", ["crossed", "raced"])
def test_every_line_fits_the_width_and_no_figure_is_dropped(run, width, request):
    record = request.getfixturevalue(run)
    for one in record["cases"]:
        one["convergence"] = {"jaccard": 0.65, "threshold": 0.7}
    whole, text = render(record, width=200), render(record, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert set(re.findall(r"[*<+-]?\d+\.\d+k?", whole)) <= set(re.findall(r"[*<+-]?\d+\.\d+k?", text))


def test_p_values_are_adjusted_by_holms_method():
    # as R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_short_figure_has_four_digits_or_three_and_a_unit():
    values = (0.998, 9.9994, 9.9996, 99.994, 99.996, 999.94, 999.96, 1234, 9960, 123456, 1.2e6, 1.84e8, 2.5e9)
    assert [short(value) for value in values] == (
        "0.998 9.999 10.00 99.99 100.0 999.9 1.00k 1.23k 9.96k 123k 1.20M 184M 2.5G".split()
    )
