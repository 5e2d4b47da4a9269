"""A light reading of PromQL: which metrics, labels and variables a query names, and whether its brackets
close.

In: a query as it stands in a dashboard, Grafana's variables included. Out: names. It is no parser: the
tests put every query to a real Prometheus; this is what `gpuglass dashboards check` can tell without one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpuglass.promql import AGGREGATIONS, KEYWORDS

_RESERVED = KEYWORDS | AGGREGATIONS
_GROUPINGS = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_STRING = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''
_TOKEN = re.compile(
    rf"(?P<string>{_STRING})|(?P<variable>\$\{{[^}}]*\}}|\$\w+)|(?P<duration>\[[^\]]*\])"
    r"|(?P<number>\d[\w.]*)|(?P<name>[a-zA-Z_:][\w:]*)|(?P<sign>!=|=~|!~|==|>=|<=|[=<>+\-*/%^(){},@])|(?P<space>\s+)"
    r"|(?P<other>.)"
)
_FUNCTION_LABELS = {"label_replace": (1, 3), "label_join": (1, 3)}
_CLOSES = {")": "(", "}": "{"}
_VARIABLE = re.compile(r"\$\{([a-zA-Z_]\w*)(?::\w+)?\}|\$([a-zA-Z_]\w*)")


@dataclass(frozen=True, slots=True)
class Scan:
    """What a query names."""

    metrics: frozenset[str]
    labels: frozenset[str]
    """Labels that it matches, groups by or joins on."""
    made: frozenset[str]
    """Labels that it makes itself, by label_replace and label_join."""
    functions: frozenset[str]
    variables: frozenset[str]
    faults: tuple[str, ...]


def variables(text: str) -> frozenset[str]:
    """Grafana's variables in a text."""
    return frozenset(one or other for one, other in _VARIABLE.findall(text))


def metrics(expr: str) -> frozenset[str]:
    """Names of the metrics that a query reads."""
    return scan(expr).metrics


def scan(expr: str) -> Scan:
    """Read one query."""
    tokens = [
        (kind, match.group())
        for match in _TOKEN.finditer(expr)
        if (kind := match.lastgroup or "") not in ("space",)
    ]
    named: set[str] = set()
    labels: set[str] = set()
    made: set[str] = set()
    functions: set[str] = set()
    faults: list[str] = []
    open_brackets: list[str] = []
    for position, (kind, text) in enumerate(tokens):
        following = tokens[position + 1][1] if position + 1 < len(tokens) else ""
        if kind == "other":
            faults.append(f"stray {text!r}")
        elif kind == "sign" and text in "({":
            open_brackets.append(text)
        elif kind == "sign" and text in ")}":
            if not open_brackets or open_brackets.pop() != _CLOSES[text]:
                faults.append(f"unbalanced {text!r}")
        elif kind == "name":
            inside_matchers = bool(open_brackets) and open_brackets[-1] == "{"
            if inside_matchers:
                labels.add(text)
                if text == "__name__" and position + 2 < len(tokens):
                    named |= _names_of_matcher(tokens[position + 1][1], tokens[position + 2][1])
            elif following == "(" and text not in _RESERVED:
                functions.add(text)
                made |= _made(text, tokens[position + 1 :])
            elif text in _GROUPINGS and following == "(":
                pass
            elif _in_grouping(tokens, position):
                labels.add(text)
            elif text.lower() not in _RESERVED or (
                text in AGGREGATIONS and following not in ("(", "by", "without")
            ):
                named.add(text)
    if open_brackets:
        faults.append(f"{open_brackets[-1]!r} is not closed")
    if not tokens:
        faults.append("empty")
    return Scan(
        frozenset(named),
        frozenset(labels - {"__name__"}),
        frozenset(made),
        frozenset(functions),
        variables(expr),
        tuple(faults),
    )


def _names_of_matcher(operator: str, value: str) -> set[str]:
    text = value.strip("\"'")
    if operator == "=" and "$" not in text:
        return {text}
    return set(text.split("|")) if operator == "=~" and re.fullmatch(r"[\w:|]+", text) else set()


def _in_grouping(tokens: list[tuple[str, str]], position: int) -> bool:
    """Whether a name stands in the brackets of by, on, …"""
    at = position - 1
    while at >= 0 and (tokens[at][0] == "name" or tokens[at][1] == ","):
        at -= 1
    return at > 0 and tokens[at][1] == "(" and tokens[at - 1][1] in _GROUPINGS


def _made(function: str, tokens: list[tuple[str, str]]) -> set[str]:
    """The label that label_replace or label_join writes: its first text at the call's own depth."""
    if function not in _FUNCTION_LABELS:
        return set()
    depth = 0
    for kind, text in tokens:
        depth += (text in ("(", "{")) - (text in (")", "}")) if kind == "sign" else 0
        if depth == 0:
            return set()
        if depth == 1 and kind == "string":
            return {text.strip("\"'")}
    return set()
