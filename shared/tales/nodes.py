"""What a story grammar is made of: the words of its lexicons, and the nodes of its plans.

A plan is a graph: each node leads to the next, a fork to one of several.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Entry:
    """A word or phrase of a lexicon with its attributes.

    `forms` holds what templates write for it; `peer` is the first entry of its lexicon that later draws
    cannot tell apart from it.
    """

    text: str
    lexicon: str
    attributes: dict[str, str]
    forms: dict[str, str] = field(default_factory=dict)
    peer: Entry | None = None


@dataclass(eq=False)
class Text:
    """A literal piece of a sentence; `gap` marks the space before a sentence."""

    text: str
    gap: bool = False
    next: Node | None = None


@dataclass(eq=False)
class Mention:
    """A place where a variable is written; one with a `source` draws the variable first.

    The source is the name of a pool or `@variable.attribute`; entries that the variables in `excluded`
    hold are not drawn. `entries` are all that the variable can hold here; `steers` says whether a later
    draw depends on it. `form` is the way of writing: `^` for a capital, `a ` for the article, then a dot
    and the attribute, if any.
    """

    variable: str
    form: str
    line: int
    source: str = ""
    excluded: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    steers: bool = False
    gap: bool = False
    next: Node | None = None

    @property
    def attribute(self) -> str:
        """The attribute that is written, "" for the entry's own text."""
        return self.form.partition(".")[2]

    @property
    def chooser(self) -> str:
        """The variable y of a draw from `@y.attribute`, "" for any other mention."""
        return self.source[1:].partition(".")[0] if self.source.startswith("@") else ""

    @property
    def needs(self) -> tuple[str, ...]:
        """The variables that must have a value before: the one written again, or those that a draw depends on."""
        if not self.source:
            return (self.variable,)
        return (*self.excluded, self.chooser) if self.chooser else self.excluded


@dataclass(eq=False)
class Fork:
    """A choice among alternatives: lists of nodes when read, their first nodes once linked."""

    branches: list
    line: int
    gap: bool = False


Node = Text | Mention | Fork


@dataclass
class Plan:
    """A story plan: first node, facts' templates, and slots: line number and the templates of a sentence.

    Templates are lists of nodes, linked to what follows in the story."""

    name: str
    line: int
    slots: list[tuple[int, list[list[Node]]]] = field(default_factory=list)
    facts: dict[str, list[Text | Mention]] = field(default_factory=dict)
    start: Node | None = None
