"""Readable grammar rules, compiled to arcs between leftmost-derivation stacks.

One rule a line: `NP[n,d] -> 6 DET[n] NOUN[n] | 2 DET[n] NOUN[n] RC[n,d-1]`.

- A number before an alternative is its weight (default 1).
- `n` and `m` are grammatical numbers, sg or pl. One that is not on the left is drawn
  evenly. `cat/cats` is the word for n = sg and for n = pl.
- `d` counts the nesting that is still allowed: an alternative that would need d < 0 is
  left out, and the weights of the others are normalised.
- What no rule defines is a word.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

from dlmlib.errors import check

NUMBERS = ("sg", "pl")
MAX_STACK, MAX_STATES = 64, 5000
ENDING = "recursion that ends (let a depth d count down)"

Stack = tuple[str, ...]  # symbols still to be written, the next one first
Rules = dict[str, tuple[list[str], list[tuple[float, list[str]]]]]


@dataclass
class Arc:
    """From one stack to the next by reading a word of class `reads`."""

    source: Stack
    reads: str
    target: Stack
    weight: float


def parse(text: str) -> Rules:
    """Read rules as name -> (variables, [(weight, symbols)]).

    Raises:
        ValueError: a line is not a rule, defines a name again, or none defines S.
    """
    rules = {}
    for line in re.sub(r"\n\s*\|", " |", text.strip()).splitlines():
        head = re.fullmatch(r"\s*(\w+)(?:\[([\w,]+)\])?\s*->(.+)", line)
        check(head is not None, "rules", line, "lines like 'NAME[n] -> 2 A[n] B | C'")
        name, variables, right = head.groups()
        check(name not in rules, "rules", line, f"one line that defines {name}")
        alternatives = []
        for part in right.split("|"):
            weight, body = re.fullmatch(r"\s*(?:([\d.]+)\s+)?(.*)", part).groups()
            check(bool(body.strip()), "rules", line, "alternatives that are not empty")
            alternatives.append((float(weight or 1), body.split()))
        rules[name] = (variables.split(",") if variables else [], alternatives)
    check("S" in rules, "rules", text, "a rule for S")
    return rules


def productions(symbol: str, rules: Rules) -> list[tuple[float, Stack]]:
    """What a symbol such as NP[sg,1] may be rewritten to, with probabilities.

    Raises:
        ValueError: wrong number of arguments, or no alternative is left at this depth.
    """
    name, given = _split(symbol)
    variables, alternatives = rules[name]
    check(len(given) == len(variables), "rules", symbol, f"arguments {variables}")
    bound = dict(zip(variables, given, strict=True))
    results = []
    for weight, body in alternatives:
        used = {argument for part in body for argument in _split(part)[1]}
        free = sorted(used & {"n", "m"} - set(bound))
        for numbers in product(NUMBERS, repeat=len(free)):
            values = bound | dict(zip(free, numbers, strict=True))
            parts = tuple(_substitute(part, values) for part in body)
            if None not in parts:
                results.append((weight / len(NUMBERS) ** len(free), parts))
    total = sum(weight for weight, _ in results)
    check(total > 0, "rules", symbol, "an alternative that is possible at this depth")
    return [(weight / total, parts) for weight, parts in results]


def compile_arcs(rules: Rules) -> list[Arc]:
    """Every arc that can be reached from the stack (S), breadth first.

    A stack's next symbol is rewritten until a word class comes first; the arc reads a
    word of that class and leaves the rest of the stack. Each leftmost derivation is one
    path, so two derivations of one sentence are two paths that read the same words.

    Raises:
        ValueError: the recursion never ends.
    """
    arcs, agenda = [], [("S",)]
    for stack in agenda:  # grows while it is read
        check(len(agenda) <= MAX_STATES, "rules", " ".join(stack[:8]), ENDING)
        for weight, symbols in _expand(stack, rules) if stack else ():
            arcs.append(Arc(stack, symbols[0], symbols[1:], weight))
            if symbols[1:] not in agenda:
                agenda.append(symbols[1:])
    return arcs


def longest_sentence(arcs: list[Arc]) -> int:
    """Number of words of the longest sentence.

    Raises:
        ValueError: there is none, since some stack returns after a few words.
    """
    following = defaultdict(set)
    for arc in arcs:
        following[arc.source].add(arc.target)
    stacks, words = {("S",)}, 0
    while stacks != {()}:
        check(words <= len(following), "rules", " ".join(min(stacks)), ENDING)
        stacks = set().union(*(following[stack] or {()} for stack in stacks))
        words += 1
    return words


def word_class(symbol: str, rules: Rules) -> dict[str, float]:
    """The words of a class with their probabilities; a word is a class of its own.

    Raises:
        ValueError: a word is listed twice, or an undefined symbol was left.
    """
    if _split(symbol)[0] not in rules:
        check("[" not in symbol, "rules", symbol, "a symbol that a rule defines")
        return {symbol: 1.0}
    words = [(parts[0], weight) for weight, parts in productions(symbol, rules)]
    check(len(dict(words)) == len(words), "rules", symbol, "each word once")
    return dict(words)


def _expand(stack: Stack, rules: Rules, budget: int = MAX_STACK):
    """All ways to rewrite the front of a stack until a word class comes first."""
    endless = budget == 0 or len(stack) > MAX_STACK
    check(not endless, "rules", " ".join(stack[:8]), ENDING)
    if _is_class(stack[0], rules):
        return [(1.0, stack)]
    return [
        (first * later, result)
        for first, parts in productions(stack[0], rules)
        for later, result in _expand(parts + stack[1:], rules, budget - 1)
    ]


def _is_class(symbol: str, rules: Rules) -> bool:
    name = _split(symbol)[0]
    bodies = rules[name][1] if name in rules else []
    return all(len(body) == 1 and _split(body[0])[0] not in rules for _, body in bodies)


def _split(symbol: str) -> tuple[str, list[str]]:
    """NP[n,d-1] -> ("NP", ["n", "d-1"])."""
    name, _, arguments = symbol.partition("[")
    return name, arguments.rstrip("]").split(",") if arguments else []


def _substitute(part: str, values: dict[str, str]) -> str | None:
    """Put the variables' values into one symbol; None if its depth would be below 0."""
    if "/" in part:
        check("n" in values, "rules", part, "a rule with n on its left")
        return part.split("/")[NUMBERS.index(values["n"])]
    name, arguments = _split(part)
    filled = []
    for argument in arguments:
        variable, minus, less = argument.partition("-")
        value = values.get(variable, variable)
        if minus:
            value = str(int(value) - int(less))
        if value.startswith("-"):
            return None
        filled.append(value)
    return f"{name}[{','.join(filled)}]" if filled else part
