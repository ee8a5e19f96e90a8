"""The tables of `spath-eval speed` say what entries hold, and explain what is suspicious."""

import re
from typing import Any

import pytest

from spath_eval.speed.table import duration, faults, render, size


def timing(**changes: Any) -> dict[str, Any]:
    return {
        "ratio": 1.5,
        "ci95": [1.4, 1.6],
        "ceiling": 2.0,
        "limit": 2.5,
        "ffn_share": 0.9,
        "dense_seconds": [0.003, 0.0031, 0.0029],
        "sparse_seconds": [0.002] * 3,
        "rounds": 3,
        "batch": 2,
        "tokens": 64,
        "least_seconds": {"dense": 0.0015, "sparse": 0.00075},
        "precision": {"requested": 0.02, "reached": True},
        **changes,
    }


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "subject": "one layer of nano, random weights",
        "execution": "eager",
        "device": "cpu",
        "dtype": "float32",
        "sparsity": 0.5,
        "conditions": {
            "threads": 2,
            "bytes_per_second": 9.3e9,
            "flops_per_second": 1.07e11,
            "load_average": [0.5, 1.25],
            "clock_mhz": [2600, 2600],
        },
        **changes,
    }


def test_every_ratio_stands_beside_its_ceiling_and_the_share_of_it_that_was_reached() -> None:
    text = render([entry(prefill=timing(), decode=timing(ratio=1.9, ci95=[1.8, 2.0], tokens=65))], 140)
    prefill, decode = (line.split() for line in text.splitlines() if line.strip().startswith("0.5"))
    assert " ".join(prefill) == (
        "0.5, 2 x 64, prefill 1.500 [1.400, 1.600] 2.000 0.75 3 3.00 ms 2.00 ms 1.50 ms, 750 us 0.90"
    )
    assert " ".join(decode).startswith("0.5, 2 x 65, decode 1.900 [1.800, 2.000] 2.000 0.95 3")
    assert "cpu, float32, 2 threads: reads 9.3 GB/s, multiplies 107 GFLOP/s; load average 0.5 to 1.2" in text
    assert "clock 2600 to 2600 MHz" in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_keep_to_the_width(width: int) -> None:
    entries = [entry(ffn=timing()), entry(subject="model", prefill=timing(), decode=timing())]
    assert max(map(len, render(entries, width).splitlines())) <= width


def test_what_was_not_reached_or_cannot_be_true_is_explained_once() -> None:
    wide = timing(precision={"requested": 0.02, "reached": False})
    high = timing(ratio=2.2, ci95=[2.1, 2.3])
    wrong = timing(ratio=3.0, ci95=[2.9, 3.1], fault="the ratio is above 2.900")
    text = render([entry(ffn=wide), entry(ffn=wide), entry(ffn=high), entry(ffn=wrong)], 140)
    rows = [line for line in text.splitlines() if line.strip().startswith("0.5")]
    assert [re.findall(r"\(\d\)", row) for row in rows] == [["(1)"], ["(1)"], ["(2)"], ["(3)"]]
    assert "(1) the time budget ended before the interval was narrower than 2% of the ratio" in text
    assert "(2) above its ceiling:" in text
    assert "(3) measurement fault: the ratio is above 2.900" in text
    assert faults([entry(ffn=wide), entry(ffn=wrong)]) == [
        "one layer of nano, random weights, 0.5, 2 x 64: the ratio is above 2.900"
    ]


def test_compiled_arms_and_what_they_are_compared_with_are_named() -> None:
    compiled = entry(
        execution="compiled",
        compiler={"graph_breaks": 2, "skipped_cuda_graphs": 0},
        decode=timing(dense_execution="compiled", other_dense_seconds={"eager": [1.0]}),
    )
    text = render([compiled], 140)
    assert "0.5, 2 x 64, decode, compiled" in text
    assert "the fastest dense arm is compiled" in text
    assert "torch.compile gave up: 2 graph breaks, 0 CUDA graphs skipped" in text


def test_memory_switches_parity_and_self_test_are_stated() -> None:
    whole = entry(
        decode=timing(ceiling=1.0, ci95=[0.99, 1.01]),
        prefill=timing(ceiling=1.0, ci95=[1.01, 1.02]),
        weight_bytes={"dense": 5_000_000_000, "sparse": 2_600_000_000},
        peak_memory={"dense": 5_100_000_000, "sparse": 2_700_000_000},
        parity={"max_relative_difference": 2e-7, "max_logit_difference": 3e-5, "tolerance": 1e-5, "ok": True},
        self_test=True,
    )
    switch = entry(
        subject="nano: switching among 2 pathways",
        switch={
            "seconds": [1e-5, 3e-5, 2e-5],
            "domains": ["math", "code"],
            "memory": {"shared": 2_000_000, "dense_ffn": 4_000_000, "pathways": {"math": 2_000_000, "code": 1_000_000}},
        },
    )
    text = " ".join(render([whole, switch], 140).split())
    assert "0.5, 2 x 64 5 GB 2.6 GB 5.1 GB 2.7 GB" in text
    assert "0.5, math, code 20.0 us 30.0 us 3 MB 4 MB 2 MB 9 MB" in text
    assert "within 2.0e-07 of the largest output (tolerance 1e-05), logits within 3.0e-05" in text
    assert "Self-test, dense against dense: 1 of 2 intervals contain 1." in text


def test_nothing_measured_is_an_empty_text() -> None:
    assert render([], 100).strip() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (0.99996, "1.00 s"), (0.12345, "123 ms"), (0.0099999, "10.0 ms"), (4.2e-7, "0.42 us")],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (12, "12 B"), (999_600, "1 MB"), (5_012_344_832, "5.01 GB"), (2_052_816_418_816, "2.05 TB")],
)
def test_sizes_have_three_digits(count: int | None, text: str) -> None:
    assert size(count) == text
