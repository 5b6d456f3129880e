"""What is in a kernel's machine code: instructions, and the longest way through them.

Reads what nvdisasm prints of a cubin with one function. Instructions that a predicate turns off are
issued, and count.
"""

from __future__ import annotations

import collections
import graphlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["Instruction", "Loops", "longest", "loops", "parse"]

LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
TARGET = re.compile(r"`\((\.L_\w+)\)")
PADDING = "NOP"


class Instruction(NamedTuple):
    """One of them.

    Attributes:
      name: without modifiers.
      successors: the places of those that may come after it.
    """

    name: str
    successors: tuple[int, ...]


def parse(text: str) -> list[Instruction]:
    """The instructions up to the trap behind the last, a branch to itself, and padding."""
    found, places = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(found)
        elif instruction := INSTRUCTION.match(line):
            predicate, name, rest = instruction.groups()
            found.append((predicate, name.split(".")[0], rest))
    while found and found[-1][1] == PADDING:
        found.pop()
    instructions = []
    for place, (predicate, name, rest) in enumerate(found):
        # For sm_80 there are calls that stand for branches: what they call does not return.
        target = TARGET.search(rest) if name in ("BRA", "CALL") else None
        # A branch may have a second predicate, or none and ask whether threads have diverged.
        always = not predicate and (target is None or not rest[: target.start()].strip())
        ends = name in ("BRA", "EXIT", "RET") and always
        successors = [] if ends else [place + 1]
        if target:
            successors.append(places[target[1]])
        instructions.append(Instruction(name, tuple(s for s in successors if s < len(found))))
    if instructions and instructions[-1].successors == (len(instructions) - 1,):
        instructions.pop()
    return instructions


class Loops(NamedTuple):
    """The loops of a program.

    Attributes:
      bodies: by the place of its first instruction, the places of each loop.
      back: the branches, from and to, that begin a loop again.
    """

    bodies: Mapping[int, frozenset[int]]
    back: frozenset[tuple[int, int]]


def loops(instructions: list[Instruction]) -> Loops:
    """What is found from the first instruction on, in depth."""
    before = collections.defaultdict(list)
    for place, instruction in enumerate(instructions):
        for successor in instruction.successors:
            before[successor].append(place)
    back = frozenset(_back(instructions))
    bodies: dict[int, frozenset[int]] = {}
    for end, head in back:
        body, todo = {head}, [end]
        while todo:
            place = todo.pop()
            if place not in body:
                body.add(place)
                todo += before[place]
        bodies[head] = bodies.get(head, frozenset()) | body
    return Loops(bodies, back)


def _back(instructions: list[Instruction]) -> Iterator[tuple[int, int]]:
    """The branches to an instruction on the way to them."""
    path = {0: iter(instructions[0].successors)}
    seen = {0}
    while path:
        place, successors = next(reversed(path.items()))
        successor = next(successors, None)
        if successor is None:
            path.popitem()
        elif successor in path:
            yield place, successor
        elif successor not in seen:
            seen.add(successor)
            path[successor] = iter(instructions[successor].successors)


def longest(instructions: list[Instruction], rounds: int) -> int:
    """How many instructions the longest way through a program takes, each loop that many times."""
    bodies, back = loops(instructions)
    after = {
        place: [s for s in instruction.successors if (place, s) not in back]
        for place, instruction in enumerate(instructions)
    }
    length: dict[int, int] = {}
    for place in graphlib.TopologicalSorter(after).static_order():  # successors first
        weight = rounds ** sum(place in body for body in bodies.values())
        length[place] = weight + max((length[s] for s in after[place]), default=0)
    return length[0]
