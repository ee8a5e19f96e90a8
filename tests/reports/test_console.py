"""The console report of the example record, word for word, and what it does where room or figures are missing."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spath_eval import records
from spath_eval.reports.console import ConsoleReport, case_line

GOLDEN = """\
Quality of gemma

  task        n  dense  sparse         difference [95%]       p    retention [95%]  lost/gained
  --------  ---  -----  ------  -----------------------  ------  -----------------  -----------
math/negative@0.15  sparsity 0.149 of 0.15 requested
  choice    300  0.853   0.843  -0.010 [-0.023, +0.000]   0.250  0.98 [0.96, 1.00]          3/0
  generate  300  0.633   0.630  -0.003 [-0.023, +0.017]   1.000  0.99 [0.96, 1.03]          5/4
math/random@0.15  sparsity 0.149 of 0.15 requested
  choice    300  0.853   0.583  -0.270 [-0.323, -0.220]  <0.001  0.55 [0.47, 0.63]         83/2
  generate  300  0.633   0.443  -0.190 [-0.243, -0.140]  <0.001  0.70 [0.63, 0.77]         63/6
language/negative@0.15  sparsity 0.149 of 0.15 requested
  choice    300  0.753   0.750  -0.003 [-0.023, +0.013]   1.000  0.99 [0.95, 1.03]          4/3
  generate  300  0.010   0.040  +0.030 [+0.010, +0.053]   0.012              - (1)         1/10
language/random@0.15  sparsity 0.149 of 0.15 requested  FAILED: mask not applied: at
    model.layers.3.mlp 105 removed neurons were not zero in decode (912 forwards)

Output preservation of gemma

case                    tokens  dense ppl  sparse ppl           ratio [95%]  cosine     KL  top-1
----------------------  ------  ---------  ----------  --------------------  ------  -----  -----
math/negative@0.15        5000       3.41        3.52  1.031 [1.024, 1.039]   0.993  0.021  0.951
math/random@0.15          5000       3.41        6.18  1.813 [1.751, 1.881]   0.882  0.591  0.660
language/negative@0.15    5000       9.87       10.73  1.087 [1.069, 1.106]   0.987  0.061  0.902

Speed of gemma

  case                     prefill [95%] / ceiling        decode [95%] / ceiling
  ----------------------  ------------------------  ----------------------------
the model
  math/negative@0.15      1.05 [1.04, 1.06] / 1.08      1.02 [1.02, 1.04] / 1.06
  language/negative@0.15  1.04 [1.03, 1.06] / 1.08      1.03 [1.02, 1.04] / 1.06
one layer of gemma-2b, random weights
  math/negative@0.15      1.12 [1.12, 1.15] / 1.15      1.14 [1.13, 1.15] / 1.15
  language/negative@0.15  1.12 [1.12, 1.14] / 1.15  1.19 [1.18, 1.20] / 1.15 (2)
not measured
  math/random@0.15 (3)                           -                             -

(1) dense 0.010 is not above chance 0.000 by two standard errors (0.012)
(2) above its ceiling: by noise, by a cache that holds the sparse weights, or by a width that suits
    the device better
(3) --no-speed

retention: (sparse - chance) / (dense - chance), so 1 keeps all that dense knows and 0 is chance.
lost/gained: documents that got worse/better than in the dense model. p: not adjusted.
sparsity: share of FFN neurons removed. [95%]: interval over documents, for speed over rounds.
cosine of final hidden states, KL in nats, top-1: same next token; on held-out text of the domain.
speed: dense time / sparse time, beside its ceiling: what removing those weights could give at most.
"""


@pytest.fixture
def example():
    return records.read(Path(__file__).parents[1] / "data" / "record.json")


def render(record, **options):
    return ConsoleReport().render(record, **options)


def test_the_report_reads_as_agreed(example):
    assert render(example) == GOLDEN


def plain(text):
    return re.sub(r"\x1b\[\d+m", "", text)


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
def test_every_line_fits_the_width_and_no_figure_is_dropped(example, width):
    text = render(example, width=width)
    assert max(map(len, text.splitlines())) <= width
    for figure in re.findall(r"[<+-]?\d+\.\d+", GOLDEN):
        assert figure in text


def test_colour_adds_nothing_but_colour(example):
    coloured = render(example, colour=True)
    assert "\x1b[31mlanguage/random@0.15" in coloured
    assert plain(coloured) == render(example)
    assert "\x1b" not in render(example)


def test_a_ratio_is_only_flagged_where_its_interval_lies_above_the_ceiling(example):
    timing = example["cases"][2]["speed"][1]["decode"]
    assert timing["ci95"][0] > timing["ceiling"]
    timing["ci95"][0] = timing["ceiling"]
    assert "above its ceiling" not in render(example)


def test_equal_reasons_share_a_footnote(example):
    entries = example["cases"][2]["quality"]
    entries[0]["retention"] = copy.deepcopy(entries[1]["retention"])
    text = render(example)
    assert text.count("- (1)") == 2
    assert text.count("(1) dense 0.010") == 1


def test_a_retention_without_interval_is_shown_with_its_reason(example):
    example["cases"][0]["quality"][0]["retention"] = {"value": 0.98, "ci95": None, "reason": "dense is often at chance"}
    text = render(example)
    assert "0.98 (1)" in text
    assert "(1) dense is often at chance" in text


def test_what_was_not_measured_is_said_not_shown(example):
    for case in example["cases"]:
        case.update(quality=[], preservation=None, preservation_reason="no held-out text", speed=[])
        case["speed_reason"] = "--no-speed"
    text = render(example)
    assert "math/negative@0.15 (1)" in text
    assert "(1) no held-out text" in text
    assert "Speed of gemma\n\nnot measured: --no-speed\n" in text
    example["cases"][0]["speed_reason"] = "masked"
    assert "math/negative@0.15: masked\nmath/random@0.15: --no-speed\n" in render(example)
    for case in example["cases"]:
        for key in ("quality", "preservation", "preservation_reason", "speed", "speed_reason", "sparsity"):
            case.pop(key, None)
    assert render(example).splitlines()[:5] == [
        "Quality of gemma",
        "",
        "math/negative@0.15",
        "math/random@0.15",
        "language/negative@0.15",
    ]


def test_an_unfinished_or_empty_run_says_so(example):
    example.update(status="interrupted", cases=[])
    assert render(example) == "This run is interrupted.\n\nNo cases.\n"


def test_models_have_tables_of_their_own(example):
    other = copy.deepcopy(example["cases"][0])
    other.update(id="phi/math/negative@0.15", model="phi")
    example["cases"].append(other)
    text = render(example)
    assert text.count("Quality of ") == 2
    assert text.index("Speed of gemma") < text.index("Quality of phi")


def test_tasks_with_several_metrics_or_filters_are_told_apart(example):
    entries = example["cases"][0]["quality"]
    entries.append({**entries[0], "metric": "acc_norm"})
    entries.append({**entries[1], "filter": "flexible"})
    text = render(example)
    for label in ("choice:acc ", "choice:acc_norm ", "generate:first-line ", "generate:flexible "):
        assert f"  {label}" in text


def test_a_long_task_name_is_shortened_before_the_table_overflows(example):
    example["cases"][0]["quality"][0]["task"] = "an_external_benchmark_" * 6
    assert max(map(len, render(example).splitlines())) <= 100


def test_a_wide_table_is_split_evenly(example):
    table = section(render(example, width=72), "Output preservation of gemma")
    assert [line.split() for line in table if line.startswith("case")] == [
        ["case", "tokens", "dense", "ppl", "sparse", "ppl"],
        ["case", "ratio", "[95%]", "cosine", "KL", "top-1"],
    ]


def section(text, title):
    """The lines from a title to the next one."""
    lines = text.splitlines()
    start = lines.index(title)
    ends = (end for end in range(start + 1, len(lines)) if re.match(r"[A-Z(].* of |\(1\)", lines[end]))
    return lines[start : next(ends, len(lines))]


def test_masks_show_what_they_remove_and_whether_the_profile_text_was_enough(example):
    agreements = [0.91, None, 0.6994]
    for case, agreement in zip(example["cases"], agreements, strict=False):
        case["convergence"] = None if agreement is None else {"jaccard": agreement, "threshold": 0.7}
        if agreement is None:
            case["convergence_reason"] = "the strategy reads no profile"
    records.validate(example)
    text = render(example)
    assert section(text, "Masks of gemma")[:-1] == [
        "Masks of gemma",
        "",
        "mask                    neurons removed  FFN weights  all weights     halves",
        "----------------------  ---------------  -----------  -----------  ---------",
        "math/negative@0.15        0.149 of 0.15        0.149        0.072      0.910",
        "math/random@0.15          0.149 of 0.15        0.149        0.072      - (2)",
        "language/negative@0.15    0.149 of 0.15        0.149        0.072  0.699 (3)",
    ]
    assert "(2) the strategy reads no profile" in text
    assert "(3) two halves of the profile text agree on less than 70% of the removed neurons: profile more text" in text
    assert "halves: " in text


def test_texts_that_share_words_with_the_profile_text_are_named_in_one_line(example):
    shares = [{"gsm8k": 0.012, "asdiv": 0.0}, {"gsm8k": 0.0, "asdiv": 0.0}, {"piqa": 0.0005}]
    for case, ngrams in zip(example["cases"], shares, strict=False):
        case["gates"]["disjoint"]["ngrams"] = ngrams
    line = "Documents that share 13 words in a row with a case's profile text: gsm8k 1.2%, piqa 0.05%."
    assert line in render(example).splitlines()
    for case in example["cases"][:3]:
        case["gates"]["disjoint"]["ngrams"] = {"gsm8k": 0.0}
    assert "13 words" not in render(example)


def test_the_noise_floor_is_a_table_where_it_was_measured(example):
    assert "oise floor" not in render(example)
    example["dense"][0]["noise_floor"] = [
        {**name, "filter": "none", "documents": 300, "differing": differing, "largest": largest, "mean": mean}
        for name, differing, largest, mean in (
            ({"task": "spath_math_choice", "metric": "acc"}, 1, 1.0, -1 / 300),
            ({"task": "spath_math_generate", "metric": "exact_match"}, 0, 0.0, 0.0),
        )
    ]
    records.validate(example)
    text = render(example)
    assert section(text, "Noise floor of gemma")[:-1] == [
        "Noise floor of gemma",
        "",
        "  task        n  differing  largest      mean",
        "  --------  ---  ---------  -------  --------",
        "math",
        "  choice    300          1        1  -0.00333",
        "  generate  300          0        0        +0",
    ]
    assert "noise floor: the dense model again, in other batches" in text


def test_quality_that_was_not_asked_for_is_one_line(example):
    for case in example["cases"][:3]:
        case.update(quality=[], quality_reason="not asked for")
    text = render(example)
    assert text.startswith(
        "Quality was not measured: not asked for.\n\nCases of gemma that did not pass\n\nlanguage/random"
    )
    assert text.count("not asked for") == 1
    assert "retention" not in text
    del example["cases"][3]
    assert render(example).startswith("Quality was not measured: not asked for.\n\nOutput preservation of gemma\n")


def test_a_perplexity_beyond_bounds_is_written_with_an_exponent(example):
    perplexity = example["cases"][0]["preservation"]["perplexity"]
    perplexity.update(sparse=4.2e8, ratio=1.23456e8, ci95=[1.1e8, 1.41e8])
    assert " 1.23e+08 [1.1e+08, 1.41e+08] " in render(example)


def test_a_finished_case_is_one_line(example):
    lines = [case_line(case) for case in example["cases"]]
    assert lines == [
        "PASSED gemma/math/negative@0.15  retention 0.99 [0.97, 1.01]  ppl x1.03  decode x1.02 of 1.06  3.2 s",
        "PASSED gemma/math/random@0.15  retention 0.63 [0.57, 0.68]  ppl x1.81  2.9 s",
        "PASSED gemma/language/negative@0.15  retention 0.99  ppl x1.09  decode x1.03 of 1.06  3.4 s",
        "FAILED gemma/language/random@0.15: mask not applied: at model.layers.3.mlp 105 removed neurons we...",
    ]
    assert max(map(len, lines)) <= 100
    assert plain(case_line(example["cases"][3], colour=True)) == lines[3]
    assert case_line(example["cases"][3], colour=True).startswith("\x1b[31mFAILED\x1b[0m gemma")


def test_the_mean_retention_has_the_interval_of_independent_tasks(example):
    case = example["cases"][0]
    ends = [((0.9, [0.8, 1.0])), (0.7, [0.4, 0.8])]
    for entry, (value, interval) in zip(case["quality"], ends, strict=True):
        entry["retention"] = {"value": value, "ci95": interval, "reason": None}
    below, above = (0.1**2 + 0.3**2) ** 0.5 / 2, (0.1**2 + 0.1**2) ** 0.5 / 2
    assert f"retention 0.80 [{0.8 - below:.2f}, {0.8 + above:.2f}]" in case_line(case)
    case["quality"][1]["retention"] = {"value": None, "ci95": None, "reason": "no chance level"}
    assert "retention 0.90 [0.80, 1.00]" in case_line(case)
    case["quality"][0]["retention"] = case["quality"][1]["retention"]
    assert "retention" not in case_line(case)


def test_a_case_line_needs_no_figure_at_all():
    case = {"id": "a/b/c@0.1", "model": "a", "domain": "b", "outcome": "passed"}
    assert case_line(case) == "PASSED a/b/c@0.1"
    assert case_line({**case, "outcome": "error", "message": "crashed:\n  why"}) == "ERROR a/b/c@0.1: crashed: why"


def test_the_plugin_is_found_under_its_name_without_heavy_imports():
    program = (
        "import sys; from spath_eval.reports import console; found = []\n"
        "console.spath_register_reports(found.append); assert [report.name for report in found] == ['console']\n"
        "print([name for name in ('torch', 'numpy', 'pandas', 'transformers', 'tabulate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
