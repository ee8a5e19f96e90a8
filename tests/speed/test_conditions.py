"""What a machine can do and is doing is measured and read, and where it is not to be had, nothing is made up."""

from pathlib import Path

import psutil
import pytest
import torch

from spath_eval.speed import conditions
from spath_eval.speed.conditions import available_memory, last_level_cache, load, measure_rates

CPU = torch.device("cpu")


def test_rates_are_those_of_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "last_level_cache", lambda device: 2**20)
    monkeypatch.setattr(conditions, "SMALLEST_BUFFER", 2**22)
    monkeypatch.setattr(conditions, "MATRIX", {"cpu": 256})
    seconds: dict[str, float] = {}

    def least(statement: str, names: dict, budget: float) -> float:
        exec(statement, {"torch": torch, **names})  # each operation can be done
        seconds[statement] = 0.5 / (1 + len(seconds))
        return seconds[statement]

    monkeypatch.setattr(conditions, "_least_seconds", least)
    rates = measure_rates(CPU, torch.float32)
    assert len(seconds) == 4
    assert rates.bytes_per_second == 2**22 / (0.5 / 3)  # the fastest of three ways to read
    assert rates.flops_per_second == 2 * 256**3 / (0.5 / 4)


def test_a_buffer_takes_no_more_than_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "available_memory", lambda device: 2**22)
    monkeypatch.setattr(conditions, "MATRIX", {"cpu": 32})
    sizes: list[int] = []

    def least(statement: str, names: dict, budget: float) -> float:
        sizes.extend(value.nbytes for value in names.values())
        return 1.0

    monkeypatch.setattr(conditions, "_least_seconds", least)
    measure_rates(CPU, torch.float32)
    assert max(sizes) == 2**20


def test_repetitions_are_really_timed() -> None:
    assert 0 < conditions._least_seconds("torch.ones(10)", {}, 0.01) < 1


def test_the_last_level_cache_is_the_largest_that_the_system_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, size in enumerate(["48K", "2048K", "32M"]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(conditions, "CACHES", tmp_path)
    assert last_level_cache(CPU) == 32 * 2**20
    monkeypatch.setattr(conditions, "CACHES", tmp_path / "absent")
    assert last_level_cache(CPU) is None


def test_available_memory_keeps_to_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(conditions, "CONTAINER_LIMITS", [limit])
    free = available_memory(CPU)
    assert 0 < free <= psutil.virtual_memory().total
    used = psutil.Process().memory_info().rss
    limit.write_text("max\n")
    assert available_memory(CPU) > 0.5 * free
    limit.write_text(f"{used + 10**6}\n")
    assert available_memory(CPU) <= 10**6 + 10**7
    limit.write_text("1\n")
    assert available_memory(CPU) == 0


def test_load_and_clock_are_left_out_where_they_are_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(load(CPU)) <= {"load_average", "clock_mhz"}
    monkeypatch.delattr(conditions.os, "getloadavg")
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    assert load(CPU) == {}
