"""Reader of story grammars: a text file becomes a checked graph of choices, for `shared.tales.generator` to interpret.

What is checked when a grammar is read is what makes its entropy a true floor: every choice shows in the
text, at the place where it is made. No opening of an alternative is a prefix of an opening of another, and
no word of a pool, taken with the character after it, is a prefix of another word of that pool. So the text
alone decides each choice, a story has one derivation, and its probability is that derivation's.

The grammar file. An indented line belongs to the heading above it; `#` starts a comment line.
    lexicon NAME attr=value; ...     then entries, separated by commas: WORD or WORD {attr=value; ...}
    pool NAME = LEXICON + LEXICON    a union
    plan NAME                        then lines `fact KEY = template`, and one sentence template per line
    | template                       another way to say the sentence above; a bare | leaves it out
In templates:
    {x=pool}  {x=pool!y,z}           draw x from a pool, different from y and z, and write it
    {x=@y.attr}                      draw x from the pool that an attribute of y names
    {x}  {x.attr}  {a x}  {^x}       write x again, an attribute, after its article, capitalised
    (one|other|)                     alternatives inside a sentence

Left out: weights. Plans, alternatives and the words of a pool are drawn uniformly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from shared.tales.nodes import Entry, Fork, Mention, Node, Plan, Text
from shared.tales.visibility import prove_choices_visible

_SLOT = re.compile(r"(\^?)(a )?(\w+)(?:\.(\w+))?(?:=(@\w+\.\w+|\w+)(?:!([\w,]+))?)?")
_ENTRY = re.compile(r"([^,{]+?)\s*(?:\{([^}]*)\}\s*)?(?:,|$)")


@dataclass
class Scope:
    """What is known at a point of a plan: the entries a variable can hold, pairs that never hold the same."""

    variables: dict[str, tuple[Entry, ...]]
    apart: set[frozenset[str]]


class Grammar:
    """A story grammar, from the text of a grammar file.

    `lexicons` maps the names of lexicons and pools to their entries, `plans` the names of plans to plans,
    and `root` is the choice of a plan.
    Raises ValueError, with the line number, on bad syntax, an unknown name, an attribute that an entry
    lacks, or two choices that the text could fail to tell apart.
    """

    def __init__(self, source: str) -> None:
        self.lexicons: dict[str, tuple[Entry, ...]] = {}
        self.plans: dict[str, Plan] = {}
        self._read(source)

        # Each plan: its sentences as one sequence, checked in the order of the story, then linked to a graph.
        draws: list[Mention] = []
        for plan in self.plans.values():
            body: list[Node] = []
            for line, templates in plan.slots:
                spaced = [[Text(" ", gap=True), *nodes] if nodes and body else nodes for nodes in templates]
                body += spaced[0] if len(spaced) == 1 else [Fork(spaced, line, gap=True)]
            found: list[Mention] = []
            scope = self._resolve(body, Scope({}, set()), found)
            for template in plan.facts.values():
                self._resolve([*template], scope, [])
            steering = {name for node in found for name in node.needs}
            for node in found:
                node.steers = node.variable in steering
            draws += found
            plan.start = _link(body, None)

        # What concerns all plans together.
        self._find_peers({node.source.split(".")[1] for node in draws if "." in node.source})
        self.root = Fork([plan.start for plan in self.plans.values()], 0)
        prove_choices_visible(self.root)

    def pool(self, name: str, line: int = 0) -> tuple[Entry, ...]:
        """Return the entries of a lexicon or pool. Raises ValueError for an unknown name."""
        if name not in self.lexicons:
            known = ", ".join(sorted(self.lexicons))
            raise ValueError(f"{f'line {line}: ' if line else ''}unknown lexicon {name!r}; known: {known}")
        return self.lexicons[name]

    def choices(self, node: Mention, bound: dict[str, Entry]) -> tuple[Entry, ...]:
        """Return what a drawing mention draws from, exclusions not yet taken out."""
        if not node.source.startswith("@"):
            return self.lexicons[node.source]
        variable, attribute = node.source[1:].split(".")
        return self.lexicons[bound[variable].attributes[attribute]]

    def _read(self, source: str) -> None:
        lexicon, defaults, plan = "", {}, None
        for number, raw in enumerate(source.splitlines(), 1):
            line = raw.strip()
            word, _, rest = line.partition(" ")
            if not line or line.startswith("#"):
                continue

            # A line that is not indented is a heading, to which the lines after it belong.
            if not raw[0].isspace():
                name, _, definition = rest.partition(" ")
                lexicon, plan = "", None
                if word == "lexicon":
                    lexicon, defaults = name, _attributes(definition)
                    self._define(name, (), number)
                elif word == "pool":
                    parts = definition.lstrip("= ").split(" + ")
                    self._define(name, sum((self.pool(part, number) for part in parts), ()), number)
                elif word == "plan":
                    plan = self.plans[name] = Plan(name, number)
                else:
                    raise ValueError(f"line {number}: {word!r} is not one of lexicon, pool, plan")

            # Below a lexicon: its entries.
            elif lexicon:
                found = [
                    Entry(text.strip(), lexicon, defaults | _attributes(own))
                    for text, own in _ENTRY.findall(line)
                ]
                self._define(lexicon, self.lexicons.pop(lexicon) + tuple(found), number)

            # Below a plan: facts, sentences, and other ways to say a sentence.
            elif plan is None:
                raise ValueError(f"line {number}: {line!r} stands below no heading")
            elif word == "fact":
                key, _, template = rest.partition("=")
                nodes = _parse_template(template.strip(), number)
                plan.facts[key.strip()] = [node for node in nodes if not isinstance(node, Fork)]
                if len(plan.facts[key.strip()]) < len(nodes):
                    raise ValueError(f"line {number}: a fact has no alternatives, got {template.strip()!r}")
            elif word == "|":
                plan.slots[-1][1].append(_parse_template(rest.strip(), number))
            else:
                plan.slots.append((number, [_parse_template(line, number)]))

    def _define(self, name: str, entries: tuple[Entry, ...], line: int) -> None:
        repeated = [text for text, count in Counter(entry.text for entry in entries).items() if count > 1]
        if repeated or name in self.lexicons:
            raise ValueError(f"line {line}: {name!r} is defined twice or holds an entry twice: {repeated}")
        self.lexicons[name] = entries

    def _resolve(self, nodes: list[Node], scope: Scope, draws: list[Mention]) -> Scope:
        """Find what each mention can write, collect `draws`, return what is known after `nodes`."""
        for node in nodes:
            # After a fork only that is known which every branch has made known.
            if isinstance(node, Fork):
                ends = [self._resolve(branch, scope, draws) for branch in node.branches]
                common = sorted(set.intersection(*(set(end.variables) for end in ends)))
                merged = {name: _unique(end.variables[name] for end in ends) for name in common}
                scope = Scope(merged, set.intersection(*(end.apart for end in ends)))

            # A mention needs variables that have a value, and gives it to one more where it draws.
            elif isinstance(node, Mention):
                for name in node.needs:
                    if name not in scope.variables:
                        known = ", ".join(scope.variables) or "none"
                        raise ValueError(f"line {node.line}: unknown variable {name!r}; known: {known}")
                if node.source:
                    scope = self._draw(node, scope)
                    draws.append(node)
                node.entries = scope.variables[node.variable]
                for entry in node.entries:
                    entry.forms[node.form] = _write(entry, node)
        return scope

    def _draw(self, node: Mention, scope: Scope) -> Scope:
        for one, other in combinations(node.excluded, 2):
            if frozenset((one, other)) not in scope.apart:
                raise ValueError(f"line {node.line}: {one!r} and {other!r} may hold the same entry")
        apart = {pair for pair in scope.apart if node.variable not in pair}
        apart |= {frozenset((node.variable, name)) for name in node.excluded}
        if not node.source.startswith("@"):
            entries = self.pool(node.source, node.line)
        else:
            variable, attribute = node.source[1:].split(".")
            pools = {
                entry: self.pool(_attribute(entry, attribute, node.line), node.line)
                for entry in scope.variables[variable]
            }
            entries = _unique(pools.values())
            if all(entry not in pool for entry, pool in pools.items()):
                apart.add(frozenset((node.variable, variable)))
        for name, others in scope.variables.items():
            if not set(others) & set(entries):
                apart.add(frozenset((node.variable, name)))
        return Scope(scope.variables | {node.variable: entries}, apart)

    def _find_peers(self, steering: set[str]) -> None:
        first: dict[tuple, Entry] = {}
        for entries in self.lexicons.values():
            for entry in entries:
                values = tuple(entry.attributes.get(name) for name in sorted(steering))
                entry.peer = first.setdefault((entry.lexicon, *values), entry)


def _unique(groups: Iterable[Iterable[Entry]]) -> tuple[Entry, ...]:
    return tuple(dict.fromkeys(entry for group in groups for entry in group))


def _attributes(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(";") if part.strip()]
    return {key.strip(): value.strip() for key, _, value in pairs}


def _attribute(entry: Entry, name: str, line: int) -> str:
    if name == "plural" and name not in entry.attributes:
        return plural(entry.text)
    if name and name not in entry.attributes:
        known = ", ".join(sorted(entry.attributes)) or "none"
        raise ValueError(f"line {line}: {entry.text!r} ({entry.lexicon}) has no {name!r}; it has: {known}")
    return entry.attributes[name] if name else entry.text


def _write(entry: Entry, node: Mention) -> str:
    text = _attribute(entry, node.attribute, node.line)
    text = f"{article(text)} {text}" if "a " in node.form else text
    return text[0].upper() + text[1:] if node.form.startswith("^") else text


def plural(noun: str) -> str:
    """Return the regular English plural."""
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def article(phrase: str) -> str:
    """Return "a" or "an", by the sound at the beginning of the phrase."""
    if re.match(r"hour|heir|honest|honour", phrase):
        return "an"
    return "an" if phrase[0] in "aeiou" and not re.match(r"uni|uku|use|eu|one\b", phrase) else "a"


def _parse_template(text: str, line: int) -> list[Node]:
    return _parse_sequence(text, 0, "", line)[0]


def _parse_sequence(text: str, position: int, closing: str, line: int) -> tuple[list[Node], int]:
    nodes: list[Node] = []
    while position < len(text) and text[position] not in closing:
        # A variable in braces.
        if text[position] == "{":
            end = text.find("}", position)
            slot = _SLOT.fullmatch(text[position + 1 : max(end, 0)])
            if slot is None:
                raise ValueError(f"line {line}: cannot read {text[position:]!r}")
            capital, article_mark, variable, attribute, source, excluded = slot.groups(default="")
            others = tuple(excluded.split(",")) if excluded else ()
            nodes.append(Mention(variable, f"{capital}{article_mark}.{attribute}", line, source, others))
            position = end + 1

        # Alternatives in brackets, which may hold others.
        elif text[position] == "(":
            branches = []
            while text[position] != ")":
                branch, position = _parse_sequence(text, position + 1, "|)", line)
                branches.append(branch)
                if position == len(text):
                    raise ValueError(f"line {line}: ( without )")
            nodes.append(Fork(branches, line))
            position += 1

        # Text, up to the next sign of these.
        else:
            signs = "{(" + closing
            end = next((i for i in range(position, len(text)) if text[i] in signs), len(text))
            nodes.append(Text(text[position:end]))
            position = end
    return nodes, position


def _link(nodes: list[Node], following: Node | None) -> Node | None:
    """Chain nodes through `next`, ending in `following`, and return the first."""
    for node in reversed(nodes):
        if isinstance(node, Fork):
            node.branches = [_link(branch, following) for branch in node.branches]
        else:
            node.next = following
        following = node
    return following
