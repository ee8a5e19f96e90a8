"""The JUnit report: each case as a test of a suite named after its model, for CI systems that show test results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl
from spath_eval.reports.console import case_line
from spath_eval.reports.matrices import Case, label

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

INVALID = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""
CHILDREN = {"failed": "failure", "error": "error", "skipped": "skipped"}
"""Outcome to the element that tells of it; a case that passed has none."""


class JunitReport:
    """The report `junit`."""

    name = "junit"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """The cases of `record`; neither `width` nor `colour` matters."""
        from xml.etree import ElementTree

        cases = record.get("cases", [])
        root = ElementTree.Element("testsuites", {"name": "spath-eval"} | _counts(cases))
        for model in dict.fromkeys(case["model"] for case in cases):
            own = [case for case in cases if case["model"] == model]
            started = {"timestamp": record["created"]} if "created" in record else {}
            suite = ElementTree.SubElement(root, "testsuite", {"name": _valid(model)} | _counts(own) | started)
            for case in own:
                _add(suite, case)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(JunitReport())


def _add(suite: Element, case: Case) -> None:
    from xml.etree import ElementTree

    about = {"classname": _valid(case["model"]), "name": _valid(label(case)), "time": f"{case.get('seconds', 0):.3f}"}
    test = ElementTree.SubElement(suite, "testcase", about)
    message = _valid(case.get("message", ""))
    if child := CHILDREN.get(case["outcome"]):
        ElementTree.SubElement(test, child, message=" ".join(message.split())).text = message
    else:
        ElementTree.SubElement(test, "system-out").text = _valid(case_line(case, width=1000))


def _counts(cases: list[Case]) -> dict[str, str]:
    outcomes = [case["outcome"] for case in cases]
    counts = {
        "tests": len(cases),
        "failures": outcomes.count("failed"),
        "errors": outcomes.count("error"),
        "skipped": outcomes.count("skipped"),
    }
    seconds = sum(case.get("seconds", 0) for case in cases)
    return {name: str(count) for name, count in counts.items()} | {"time": f"{seconds:.3f}"}


def _valid(text: str) -> str:
    return INVALID.sub("\N{REPLACEMENT CHARACTER}", text)
