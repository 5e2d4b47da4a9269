"""Runs the benchmarks and writes their figures as one table.

In: every `tests/benchmarks/*.py`, each of which ends with a JSON line. Out: a Markdown table on standard
output and in `build/benchmarks.md`; exit code 1 if a benchmark failed or missed a target. `--quick` is
passed on.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(script: Path, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The last line of one benchmark's output, or None if it failed; its errors go to standard error."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return None
    return None if done.returncode and not result.get("missed") else result


def table(results: dict[str, dict[str, Any] | None]) -> str:
    """One row per figure, with its target and whether it was missed."""
    rows = ["| benchmark | figure | value | target | |", "|---|---|---|---|---|"]
    for name, result in results.items():
        if result is None:
            rows.append(f"| {name} | | | | failed |")
            continue
        for figure, value in result["figures"].items():
            verdict = "missed" if figure in result["missed"] else ""
            rows.append(
                f"| {name} | {figure} | {value:.4g} | {result['targets'].get(figure, '')} | {verdict} |"
            )
    return "\n".join(rows) + "\n"


def missed(figures: Mapping[str, float], targets: Mapping[str, str]) -> list[str]:
    """Targets (`<= NUMBER` or `>= NUMBER`) that the figures do not meet, as far as they are there."""
    found = []
    for name, target in targets.items():
        sign, bound = target.split()
        if name in figures and not (
            figures[name] <= float(bound) if sign == "<=" else figures[name] >= float(bound)
        ):
            found.append(name)
    return found


def finish(name: str, figures: Mapping[str, float], targets: Mapping[str, str]) -> int:
    """Print a benchmark's JSON line; gives its exit code."""
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    result = {
        "benchmark": name,
        "machine": machine,
        "figures": dict(figures),
        "targets": {figure: target for figure, target in targets.items() if figure in figures},
        "missed": missed(figures, targets),
    }
    print(json.dumps(result))
    return 0


def main(arguments: Sequence[str]) -> int:
    scripts = sorted(p for p in (ROOT / "tests/benchmarks").glob("*.py") if not p.name.startswith("_"))
    results = {script.stem: run(script, arguments) for script in scripts}
    text = table(results)
    print(text, end="")
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/benchmarks.md").write_text(text)
    return int(any(result is None or result["missed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
