"""The HTML report: one page that needs nothing else, says what the record says, and runs nothing that it holds."""

import copy
import itertools
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spath_eval import records
from spath_eval.reports.console import ConsoleReport
from spath_eval.reports.html import HtmlReport

SECTIONS = "quality trade-off speed specialisation across league flips tables notes provenance".split()


@pytest.fixture
def example():
    return records.read(Path(__file__).parents[1] / "data" / "record.json")


def render(record):
    return HtmlReport().render(record)


def tree(page):
    """The page, parsed as strictly as XML is: whatever is not closed or escaped would raise."""
    return ElementTree.fromstring(page.partition("<!DOCTYPE html>")[2])


def section(page, name):
    """All text of a section, its white space made single."""
    return words(tree(page).find(f".//section[@id='{name}']"))


def words(element):
    return " ".join(" ".join(element.itertext()).split())


def classes(page, tag, name):
    return [one for one in tree(page).iter(tag) if name in one.get("class", "").split()]


def test_the_page_needs_nothing_but_itself(example):
    page = render(example)
    root = tree(page)
    assert {one.tag for one in root.iter()}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    )
    for element in root.iter():
        assert element.get("src") is None
        assert element.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in element.attrib)
    assert "@import" not in page
    assert "url(" not in page
    policy = root.find(".//meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy.startswith("default-src 'none'")


def test_every_section_is_there_and_linked(example):
    root = tree(render(example))
    assert [one.get("id") for one in root.iter("section")] == SECTIONS
    assert [one.get("href") for one in root.find(".//nav")] == [f"#{name}" for name in SECTIONS]
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(ids) == len(set(ids))


def test_every_figure_of_the_console_report_is_there(example):
    text = words(tree(render(example)).find("body"))
    figures = re.findall(r"[<+-]?\d+\.\d+", ConsoleReport().render(example, width=1000))
    assert len(figures) > 100
    assert [figure for figure in figures if figure not in text] == []


def test_it_fits_a_phone_and_either_colour_scheme(example):
    page = render(example)
    viewport = tree(page).find(".//meta[@name='viewport']").get("content")
    assert viewport == "width=device-width, initial-scale=1"
    assert "@media (prefers-color-scheme: dark)" in page
    assert "@media (max-width: 44rem)" in page


def test_tables_can_be_used_without_seeing_them(example):
    for table in tree(render(example)).iter("table"):
        assert table.find("caption") is not None or table.get("aria-label")
        headers = [one for one in table.iter("th") if one.get("scope")]
        assert headers
        assert {one.get("scope") for one in headers} <= {"col", "row", "rowgroup"}
    for picture in tree(render(example)).iter("svg"):
        named = picture.get("role") == "img" and picture.find("title") is not None
        assert named or picture.get("aria-hidden") == "true" or picture.get("overflow") == "hidden"


def test_what_did_not_pass_is_said_before_anything_else(example):
    page = render(example)
    header = words(tree(page).find(".//header"))
    assert "1 of 4 cases did not pass gemma/language/random@0.15 : failed: mask not applied" in header
    example.update(status="interrupted", cases=[])
    page = render(example)
    assert "This run is interrupted." in page
    assert "No cases." in page


def test_estimates_have_intervals_and_undefined_ones_their_reason(example):
    text = section(render(example), "quality")
    assert "math/negative@0.15 0.99 [0.97, 1.01] mean of 2 scores" in text
    assert "spath_math_choice 0.98 [0.96, 1.00] 300 documents, 3 lost, 0 gained" in text
    assert "spath_language_generate, exact_match - 300 documents, 1 lost, 10 gained; dense 0.010 is not above" in text
    assert "math/random@0.15 1.813 [1.751, 1.881]" in text


def test_speed_stands_beside_its_ceiling(example):
    page = render(example)
    text = section(page, "speed")
    assert "math/negative@0.15, decode 1.02 [1.02, 1.04] of 1.06 faster, 32% of the possible gain" in text
    assert "1.19 [1.18, 1.20] of 1.15 above its ceiling: by noise, by a cache" in text
    assert "Not measured in some cases: --no-speed" in text
    ceilings = [one for one in classes(page, "path", "ceiling") if "V17" in one.get("d")]
    assert len(ceilings) == 8


def test_one_measurement_of_several_cases_is_one_line(example):
    layer = example["cases"][0]["speed"][1]
    for case in example["cases"][2:]:
        case["speed"] = [copy.deepcopy(layer)]
        case.pop("speed_reason", None)
    text = section(render(example), "speed")
    assert text.count("1.14 [1.13, 1.15]") == 1
    assert "faster, 92% of the possible gain; timed once for 3 cases" in text


def test_a_mask_that_was_timed_elsewhere_needs_no_reason(example):
    crossed = copy.deepcopy(example["cases"][0])
    crossed.update(id="gemma/math>language/negative@0.15", evaluated_on="language", speed=[])
    crossed["speed_reason"] = "the same pathway as in gemma/math/negative@0.15"
    example["cases"].append(crossed)
    text = section(render(example), "speed")
    assert "the same pathway" not in text
    assert "Not measured in some cases: --no-speed" in text


def test_controls_do_not_squeeze_the_others(example):
    random = example["cases"][1]
    random["strategy"]["control"] = True
    random["preservation"]["perplexity"].update(ratio=1300.0, ci95=[1200.0, 1400.0])
    page = render(example)
    first, second = (
        next(one for one in tree(page).iter("table") if one.get("aria-label") == name)
        for name in ("Perplexity ratio", "Retention")
    )
    for table in (first, second):
        assert "random" not in "".join(table.itertext())
    (controls,) = tree(page).find(".//section[@id='quality']").iter("details")
    assert "math/random@0.15 1.30k [1.20k, 1.40k]" in words(controls)
    assert "random (control)" in section(page, "trade-off")


def test_a_chart_is_drawn_for_each_domain_and_quantity(example):
    page = render(example)
    titles = [one.find("title").text for one in classes(page, "svg", "panel")]
    quantities = ("mean retention", "perplexity ratio", "decode speed / dense")
    assert titles == [
        f"{domain}: {quantity} by share of FFN neurons removed"
        for quantity, domain in itertools.product(quantities, ("math", "language"))
    ]
    tips = [one.text for one in tree(page).iter("title")]
    assert "math/negative@0.15, 14.9% removed: 1.02 [1.02, 1.04] of 1.06" in tips


def test_the_heat_map_shows_shares_by_layer_and_domain(example):
    assert "Not shown: the record has none." in section(render(example), "specialisation")
    profile = example["profiles"][0]
    profile.update(specialisation=None, specialisation_reason="one domain has nothing to compare with")
    assert "Not shown: one domain has nothing to compare with." in section(render(example), "specialisation")
    shares = [(0.0, 0.02), (0.1, 0.2), (0.05, 0.4)]
    profile["specialisation"] = {
        f"model.layers.{layer}.mlp": {"math": one, "language": other} for layer, (one, other) in enumerate(shares)
    }
    del profile["specialisation_reason"]
    example["profiles"].append(copy.deepcopy(profile) | {"fingerprint": "another"})
    records.validate(example)
    page = render(example)
    (table,) = classes(page, "table", "heat")
    assert [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")] == [
        ["FFN", "math", "language"],
        ["layer 0", "0.0%", "2.0%"],
        ["layer 1", "10.0%", "20.0%"],
        ["layer 2", "5.0%", "40.0%"],
    ]
    styles = [cell.get("style") for cell in table.iter("td")]
    assert (styles[0], styles[-1]) == ("background:rgb(68 1 84);color:#fff", "background:rgb(253 231 37);color:#000")
    profile["specialisation"] = {path: {"math": 0.1} for path in ("layers.0.shared", "layers.0.experts")}
    assert "layers.0.shared 10.0%" in section(render(example), "specialisation")


def test_each_heat_map_says_of_which_profile_it_is_and_has_layers_in_their_order(example):
    profile = example["profiles"][0]
    paths = [f"model.layers.{layer}.mlp" for layer in (0, 1, 10, 2)]
    profile.update(fingerprint="a" * 64, tokens={"math": 20000, "language": 19000})
    profile["specialisation"] = {path: {"math": 0.1, "language": 0.2} for path in paths}
    other = copy.deepcopy(profile) | {"fingerprint": "b" * 64, "tokens": {"math": 500}}
    other["specialisation"] = {path: {"math": 0.3} for path in paths}
    example["profiles"].append(other)
    first, second = classes(render(example), "table", "heat")
    assert [row.find("th").text for row in first.iter("tr")] == ["FFN", "layer 0", "layer 1", "layer 2", "layer 10"]
    assert words(first.find("caption")).endswith("profile aaaaaaaaaaaa, 19,000 to 20,000 tokens of each domain")
    assert words(second.find("caption")).endswith("profile bbbbbbbbbbbb, 500 tokens of each domain")


def test_matrix_and_league_are_those_of_the_tables(example):
    page = render(example)
    assert section(page, "across").endswith("No mask was evaluated on a domain that is not its own.")
    assert section(page, "league").endswith("Fewer than two strategies that are not controls were evaluated.")
    crossed = copy.deepcopy(example["cases"][0])
    crossed.update(id="gemma/math>language/negative@0.15", evaluated_on="language")
    example["cases"].append(crossed)
    for case in example["cases"]:
        case["strategy"]["control"] = False
    page = render(example)
    assert "Across domains, gemma, negative@0.15: perplexity ratio [95%]" in section(page, "across")
    assert "League of gemma: mean retention [95%]" in section(page, "league")


def flip(**changes):
    document = {
        "doc_id": 3,
        "prompt": "2 + 2 =",
        "target": "4",
        "change": "lost",
        "dense": {"answer": "4", "score": 1.0},
        "sparse": {"answer": " 5 apples", "read_as": "5", "score": 0.0},
    }
    return {
        "task": "sums",
        "metric": "acc",
        "filter": "none",
        "lost": 2,
        "gained": 0,
        "documents": [document | changes],
    }


def test_flips_are_shown_with_prompt_and_both_answers(example):
    assert "Not shown: the samples were not read." in section(render(example), "flips")
    example["flips"] = {"gemma/math/negative@0.15": [flip()]}
    text = section(render(example), "flips")
    assert (
        "gemma/math/negative@0.15 : 2 lost, 0 gained sums, acc: 2 lost, 0 gained The first 1 in document order." in text
    )
    assert "Document 3: lost 2 + 2 = right answer 4 dense score 1 4 sparse score 0 5 apples read as 5" in text
    example["flips"] = {}
    assert "No document's score changed." in section(render(example), "flips")
    example.update(flips=None, flips_reason="there is no samples file")
    assert "Not shown: there is no samples file." in section(render(example), "flips")


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{ 7 * 7 }}\x00\x1b[31m\u202e]]>"


def replaced(value):
    """Every text in `value` that is no key, with something hostile behind it."""
    if isinstance(value, dict):
        kept = ("model", "outcome", "status", "subject", "id", "domain", "evaluated_on", "change")
        return {key: one if key in kept else replaced(one) for key, one in value.items()}
    if isinstance(value, list):
        return [replaced(one) for one in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_text_from_a_record_or_a_model_is_never_markup(example):
    plain = render(example | {"flips": {"gemma/math/negative@0.15": [flip()]}})
    record = replaced(example) | {"flips": {f"gemma/math/negative@0.15{HOSTILE}": [replaced(flip())]}}
    case = record["cases"][0]
    case.update(id=case["id"] + HOSTILE, domain=HOSTILE, evaluated_on=HOSTILE, outcome="passed")
    for found in record["cases"]:
        found["model"] = HOSTILE
        for entry in found.get("speed", []):
            entry["subject"] += HOSTILE
    for entry in record["dense"] + record["profiles"]:
        entry["model"] = HOSTILE
    page = render(record)
    root = tree(page)
    assert {one.tag for one in root.iter()} <= {one.tag for one in tree(plain).iter()}
    assert {name for one in root.iter() for name in one.attrib} <= {
        name for one in tree(plain).iter() for name in one.attrib
    }
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page
    assert "\x00" not in page
    assert "␀␛[31m" in page


def test_provenance_is_whole(example):
    example["environment"].update(revision={"commit": "0123456789" * 4, "dirty": True}, revision_reason="-")
    text = section(render(example), "provenance")
    for part in (
        "spath-eval run --arch gemma --strategy negative --domain math,language",
        "0123456789" * 4 + " with uncommitted changes",
        "transformers 5.24.0",
        "AMD EPYC",
        "device cpu",
        "dtype float32",
        "9372c470eeadd5ecd9c3c74c2b3cb633",
        "1900eab6c028483d7126599ee6f50de0",
        "5356e357697da5e8bafe152586a4b435",
        "a5cd7fe02c03b030d891bcd7aacc0af2",
        "a243e29d1799d1bee4c0d4e2b823ae36c9f33b0dfa59d4f346ab368b0c298c3a",
        "defaults spath-eval 0.1.0",
        "yes at 6 sites",
        "yes, to 2.1e-07",
        "gemma/language/random@0.15 compact NO at 6 sites",
        '"execution": "compact"',
    ):
        assert part in text
    example["environment"].update(revision=None, revision_reason="git is not installed")
    assert "revision - (git is not installed)" in section(render(example), "provenance")


def test_models_have_parts_of_their_own(example):
    example["cases"].append(copy.deepcopy(example["cases"][0]) | {"id": "phi/math/negative@0.15", "model": "phi"})
    root = tree(render(example))
    assert root.find(".//h1").text == "gemma, phi"
    assert len([one for one in root.iter("p") if one.get("class") == "verdict"]) == 2
    headings = [one.text for one in root.find(".//section[@id='quality']").iter("h3")]
    assert headings == ["gemma", "phi"]


def test_a_record_with_nothing_in_it_makes_a_page():
    assert "No cases" in render({"version": 1})
    assert "nothing can be said" in render(
        {
            "cases": [
                {
                    "id": "a/b/c@0.1",
                    "model": "a",
                    "domain": "b",
                    "outcome": "error",
                    "message": "crashed",
                    "strategy": {"kind": "static"},
                }
            ]
        }
    )


@pytest.mark.parametrize("name", ["html", "markdown", "csv", "latex", "json", "junit"])
def test_the_plugin_is_found_under_its_name_without_heavy_imports(name):
    program = (
        f"import sys; from spath_eval.reports import {name} as module; found = []\n"
        "module.spath_register_reports(found.append)\n"
        f"assert [report.name for report in found] == [{'md' if name == 'markdown' else name!r}]\n"
        "print([name for name in ('torch', 'numpy', 'pandas', 'transformers', 'jinja2') if name in sys.modules])"
    ).replace("[md]", "['md']")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
