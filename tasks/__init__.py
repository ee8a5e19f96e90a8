"""The built-in domains' evaluation items as lm-eval tasks: YAML files, and the loader that they name."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""What lm-eval's `TaskManager(include_path=...)` needs to find them."""
