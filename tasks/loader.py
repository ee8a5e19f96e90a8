"""What the tasks' YAML files call: the items of a domain as a dataset."""

from __future__ import annotations

import importlib
from typing import Any

import datasets


def items(domain: str, form: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The split `test` of a domain's items of the form `choice` or `generate`, as lm-eval's `custom_dataset` wants it.

    Columns: `prompt`, `answer`, and with choices `choices` and `label`, the position of the answer among them.
    """
    corpus = importlib.import_module(f"spath_eval.plugins.domains.{domain}").CORPUS
    rows: list[dict[str, Any]] = []
    for item in corpus.items(form):
        row: dict[str, Any] = {"prompt": item.prompt, "answer": item.answer}
        if item.choices:
            row |= {"choices": list(item.choices), "label": item.choices.index(item.answer)}
        rows.append(row)
    return {"test": datasets.Dataset.from_list(rows)}
