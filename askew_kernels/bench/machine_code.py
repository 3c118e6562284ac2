"""Machine code of NVIDIA GPUs as nvdisasm prints it: instructions, basic blocks, loops, and the path of a loop that is
taken in the usual case.

THE USUAL PATH of a loop is the one with the fewest instructions from its head back to its head that makes exactly the
memory accesses that the case is said to make (so many loads and stores of 16 bytes: the path for unaligned rows makes
none, that of a tensor without momentum makes fewer), at least the other instructions that the case needs (an annealed
step divides), and calls no subroutine (the slow paths of division and of square roots are subroutines). Where two
branches ask the same condition, they take the same side: values are followed through the loop as expressions. An
instruction that a predicate switches off is issued all the same, and is counted. Loops inside are counted as often as
the case says.
"""

from __future__ import annotations

import functools
import operator
import re
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

INSTRUCTION = re.compile(r"^/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_]*)((?:\.[\w]+)*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
BARRIER = re.compile(r"\bB(\d+)\b")
FOR_ALL = ("@PT", "@UPT", "")  # predicates that are no conditions

# An instruction's class, by its first name; the first that matches. What has a place of its own in the SM is one class:
# fp32 adds and multiplies (and the integer multiply-adds that the compiler also takes for moves), LOP3, the other
# integer operations with compares, minima, selections and moves, conversions and the special functions, memory, what is
# done once for a warp (uniform), tensor cores, control.
CLASSES: tuple[tuple[str, str], ...] = (
    ("tensor", r"[HIQDB]MMA|[HIQ]GMMA|UTC\w*MMA|LDSM|MOVM|WARPGROUP"),
    ("memory", r"LD[GSCL]?|ST[GSL]?|LDGSTS|LDGDEPBAR|DEPBAR|LDC|ATOM\w?|RED|UBLK\w*|UTMA\w*|SYNCS|CCTL\w*|"
               r"ERRBAR|MEMBAR|FENCE|S2R|CS2R|SHFL|PREFETCH"),
    ("control", r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|WARPSYNC|YIELD|BAR|NOP|NANOSLEEP|VOTE|BMOV|ELECT|"
                r"ACQBULK|BPT|KILL"),
    ("conversion", r"F2\w+|I2\w+|FRND|MUFU|FCHK"),
    ("uniform", r"U(?!NDEF)\w+|R2UR|VOTEU|LDCU"),
    ("logic", r"P?LOP3"),
    ("fp32", r"FADD2?|FMUL2?|FFMA2?|FADD32I|FMUL32I|FFMA32I|IMAD|HADD2|HMUL2|HFMA2|HADD2_32"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("int", r".*"),
)  # fmt: skip
CLASS_NAMES = tuple(name for name, _ in CLASSES)
ACCESSES = ("LDG", "STG", "LDGSTS")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@functools.cache
def group_of(name: str) -> str:
    """The class that instructions of this name are counted in."""
    return next(group for group, names in CLASSES if re.fullmatch(names, name))


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "" where it always runs
    name: str  # FFMA
    modifiers: tuple[str, ...]  # ("FTZ",)
    operands: str

    def __str__(self) -> str:
        return f"{self.address:06x} {self.predicate:>5} {'.'.join((self.name, *self.modifiers))} {self.operands}"

    @property
    def group(self) -> str:
        return group_of(self.name)

    @property
    def bytes(self) -> int:
        """Of a load or store, for one thread."""
        return next((WIDTHS[m] for m in self.modifiers if m in WIDTHS), 4)

    @property
    def label(self) -> str:
        """What cases call it: ``LDG.16`` for a global load of 16 bytes, else its name and first modifier."""
        if self.name in ACCESSES:
            return f"{self.name}.{self.bytes}"
        return ".".join((self.name, *self.modifiers[:1]))


@dataclass
class Block:
    """Instructions that run one after the other; ``following``: the blocks that may come next."""

    instructions: list[Instruction]
    following: list[int] = field(default_factory=list)

    @functools.cached_property
    def labels(self) -> Counter[str]:
        return Counter(i.label for i in self.instructions)

    @functools.cached_property
    def slow(self) -> bool:
        """Whether it calls a subroutine; a CALL of a label of the kernel itself is a jump."""
        return any(i.name == "CALL" and not TARGET.search(i.operands) for i in self.instructions)


@dataclass
class Kernel:
    name: str  # mangled
    blocks: list[Block]


@dataclass(frozen=True)
class Loop:
    head: int
    blocks: frozenset[int]


@dataclass(frozen=True)
class Path:
    """One round of a loop (or a kernel without one) on its usual path, for one thread."""

    counts: Counter[str]  # instructions by class
    slow_calls: int  # of the loop: subroutines that another path calls
    looped: bool
    steps: tuple[int, ...]  # its blocks

    @property
    def instructions(self) -> float:
        return sum(self.counts.values())

    def listing(self, kernel: Kernel) -> str:
        return "\n--\n".join("\n".join(map(str, kernel.blocks[n].instructions)) for n in self.steps)


def disassemble(nvdisasm: str, cubin: str) -> str:
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{nvdisasm}: {done.stderr.strip()[:300]}")
    return done.stdout


def read_kernels(text: str) -> list[Kernel]:
    """The kernels of nvdisasm's text; device functions that were not inlined stand in the text of their kernel."""
    kernels = []
    for part in re.split(r"^\s*\.section\s+", text, flags=re.M)[1:]:
        if not part.startswith(".text."):
            continue
        name = part[len(".text.") :].split(",", 1)[0].strip().strip('"')
        kernels.append(Kernel(name, _blocks(part.splitlines())))
    return kernels


ENDS = ("BRA", "BRX", "JMP", "EXIT", "RET", "BSYNC", "CALL", "KILL", "BREAK")  # of a block


def _blocks(lines: Iterable[str]) -> list[Block]:
    labels: dict[str, int] = {}  # to the place of the instruction that follows
    code: list[Instruction] = []
    for line in map(str.strip, lines):
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            modifiers = tuple(filter(None, found[4].split(".")))
            code.append(Instruction(int(found[1], 16), found[2] or "", found[3], modifiers, found[5]))
    starts = {0, *labels.values(), *(k + 1 for k, i in enumerate(code) if i.name in ENDS)}
    order = sorted(s for s in starts if s < len(code))
    number = {s: n for n, s in enumerate(order)}
    blocks = [Block(code[s:e]) for s, e in zip(order, [*order[1:], len(code)], strict=True)]
    _connect(blocks, {label: number[at] for label, at in labels.items() if at in number})
    return blocks


Join = tuple[str, int]  # a barrier, and the block where its threads meet


def _connect(blocks: list[Block], places: Mapping[str, int]) -> None:
    """Fills in what may follow each block. A BSYNC goes where the BSSY of its barrier said, which may be in any of the
    blocks that lead to it."""
    joins: list[set[Join]] = [set() for _ in blocks]  # known where a block begins
    work = list(range(len(blocks)))
    while work:  # until nothing changes
        n = work.pop()
        known = set(joins[n])
        for i in blocks[n].instructions:
            if i.name == "BSSY" and (barrier := BARRIER.search(i.operands)) and (to := TARGET.search(i.operands)):
                known = {join for join in known if join[0] != barrier[1]} | {(barrier[1], places[to[1]])}
        blocks[n].following = _following(blocks, n, known, places)
        for following in blocks[n].following:
            if not known <= joins[following]:
                joins[following] |= known
                work.append(following)


def _following(blocks: Sequence[Block], n: int, known: Iterable[Join], places: Mapping[str, int]) -> list[int]:
    last = blocks[n].instructions[-1]
    always = last.predicate in FOR_ALL
    following: list[int] = []
    if last.name in ("BRA", "BRX", "JMP") or (last.name == "CALL" and TARGET.search(last.operands)):
        always = always and not re.match(r"!?U?P\d", last.operands)  # BRA !P4, `(…)
        following = [places[label] for label in re.findall(r"\.L_x_\d+", last.operands) if label in places]
    elif last.name == "BSYNC" and (barrier := BARRIER.search(last.operands)):
        following = [to for name, to in known if name == barrier[1]]
    elif last.name not in ("EXIT", "RET", "KILL"):
        always = False
    if not always and n + 1 < len(blocks):
        following.append(n + 1)
    return list(dict.fromkeys(following))


def reachable(blocks: Sequence[Block], start: int = 0) -> list[int]:
    """In an order in which a block comes after those that lead to it, but for loops."""
    seen, order = set(), []
    stack = [(start, iter(blocks[start].following))]
    seen.add(start)
    while stack:
        n, rest = stack[-1]
        to = next((t for t in rest if t not in seen), None)
        if to is None:
            order.append(n)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(blocks[to].following)))
    return order[::-1]


def find_loops(blocks: Sequence[Block]) -> list[Loop]:
    """The natural loops, smallest first; those that share a head are one."""
    order = reachable(blocks)
    place = {n: k for k, n in enumerate(order)}
    before: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for to in blocks[n].following:
            before[to].append(n)
    above = {order[0]: order[0]}  # immediate dominators (Cooper, Harvey and Kennedy, 2001)

    def common(a: int, b: int) -> int:
        while a != b:
            a, b = (above[a], b) if place[a] > place[b] else (a, above[b])
        return a

    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            known = [p for p in before[n] if p in above]
            new = known[0]
            for p in known[1:]:
                new = common(new, p)
            if above.get(n) != new:
                above[n], changed = new, True

    def dominates(a: int, n: int) -> bool:
        while place[n] > place[a]:
            n = above[n]
        return n == a

    bodies: dict[int, set[int]] = {}
    for n in order:
        for head in blocks[n].following:
            if not dominates(head, n):
                continue
            body = bodies.setdefault(head, {head})
            work = [n]
            while work:
                inside = work.pop()
                if inside not in body:
                    body.add(inside)
                    work += before[inside]
    loops = [Loop(head, frozenset(body)) for head, body in bodies.items()]
    return sorted(loops, key=lambda loop: (len(loop.blocks), loop.head))


@dataclass(frozen=True)
class Wanted:
    """What a path must make: ``exactly`` so many of these labels, ``at_least`` so many of those; ``A|B`` is either.
    rounds: how often a loop inside runs."""

    exactly: Mapping[str, int]
    at_least: Mapping[str, int] = field(default_factory=dict)
    rounds: float = 1.0

    def tally(self, block: Block) -> tuple[int, ...]:
        found = block.labels
        return tuple(sum(found[label] for label in names.split("|")) for names in (*self.exactly, *self.at_least))

    def __post_init__(self) -> None:
        whole = (*self.exactly.values(), *self.at_least.values())
        object.__setattr__(self, "whole", whole)  # asked for at each step

    whole: tuple[int, ...] = field(init=False)

    def added(self, so_far: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...] | None:
        """None where that is too much of something."""
        if not any(more):
            return so_far
        exact, sums = len(self.exactly), []
        for k, (a, b, most) in enumerate(zip(so_far, more, self.whole, strict=True)):
            if a + b > most and k < exact:
                return None
            sums.append(min(a + b, most))
        return tuple(sums)


# ---- conditions: branches that ask the same ------------------------------------------------------------------------

NO_RESULT = re.compile(
    r"ST[GSL]?|RED|BRA|BRX|JMP|EXIT|RET|BSSY|BSYNC|BREAK|WARPSYNC|YIELD|BAR|NOP|CALL|DEPBAR|LDGDEPBAR|LDGSTS|MEMBAR|"
    r"ERRBAR|CCTL\w*|KILL|SYNCS|UBLK\w*|UTMA\w*|BMOV"
)
UNKNOWN = re.compile(r"LD[GSL]?|LDSM|S2R|S2UR|CS2R|SHFL|ATOM\w?|VOTE\w?|MATCH|\w*MMA|ELECT|LEPC")  # new at each run
REGISTER = re.compile(r"\bU?(?:R|P)\d+\b")
PREDICATE = re.compile(r"^!?U?P(\d+|T)$")


class Values:
    """What registers and predicates hold, as expressions of what they held at the loop's head: the same number is the
    same value. Where paths meet with different values there is a new one."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def of(self, expression: Any) -> int:
        return self.numbers.setdefault(expression, len(self.numbers))

    def read(self, name: str, held: Mapping[str, int]) -> int:
        return held[name] if name in held else self.of(("before", name))

    def step(self, i: Instruction, held: dict[str, int]) -> None:
        if NO_RESULT.fullmatch(i.name):
            return
        operands = [o.strip() for o in i.operands.split(",")]
        results = 1
        if len(operands) > 1 and (PREDICATE.match(operands[1]) or (PREDICATE.match(operands[0]) and i.name == "LOP3")):
            results = 2
        sources = ",".join(operands[results:])
        known = tuple(self.read(r, held) for r in REGISTER.findall(sources))
        base = (
            ("at", i.address) if UNKNOWN.fullmatch(i.name) else (i.name, i.modifiers, REGISTER.sub("_", sources), known)
        )
        condition = (i.predicate, self.read(i.predicate.lstrip("@!"), held)) if i.predicate not in FOR_ALL else None
        for k, operand in enumerate(operands[:results]):
            found = REGISTER.match(operand)
            if not found:
                continue
            letter, number = re.match(r"(U?[RP])(\d+)", found[0]).groups()  # type: ignore[union-attr]
            for more in range(1 if "P" in letter else self.width(i)):
                name = f"{letter}{int(number) + more}"
                value = self.of((base, k, more))
                held[name] = value if condition is None else self.of(("if", condition, value, self.read(name, held)))

    @staticmethod
    def width(i: Instruction) -> int:
        """Registers that it may write."""
        if "128" in i.modifiers or i.name.endswith("MMA") or i.name == "LDSM":
            return 4
        wide = i.name in ("CS2R", "LDC", "ULDC", "LDCU", "LD", "LDG", "LDS", "LDL") or i.name.startswith("D")
        return 2 if wide or {"64", "WIDE", "F64"} & set(i.modifiers) else 1

    def merged(self, block: int, befores: Sequence[Mapping[str, int]]) -> dict[str, int]:
        held = {}
        for name in set().union(*befores):
            values = {self.read(name, before) for before in befores}
            held[name] = values.pop() if len(values) == 1 else self.of(("meet", block, name))
        return held


def question(i: Instruction) -> tuple[str, bool] | None:
    """(predicate, its value where the branch is taken) of ``@!P0 BRA …`` or ``BRA.U !UP0, …``; None of any other."""
    of_operand = re.match(r"!?(UP|P)\d+", i.operands)
    text = i.predicate.lstrip("@") if i.predicate not in FOR_ALL else of_operand[0] if of_operand else ""
    if i.name != "BRA" or not text or (of_operand and i.predicate not in FOR_ALL):
        return None
    return text.lstrip("!"), "!" not in text


Asked = tuple[int, bool]  # a condition's number, and its answer on the way to the branch's target


def conditions(blocks: Sequence[Block], order: Sequence[int], back: Collection[tuple[int, int]]) -> dict[int, Asked]:
    """What the branch at the end of each block asks, where that is one predicate."""
    values, after = Values(), dict[int, dict[str, int]]()
    before: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for to in blocks[n].following:
            if to in before and (n, to) not in back:
                before[to].append(n)
    asked = {}
    for n in order:
        held = values.merged(n, [after[m] for m in before[n] if m in after]) if n != order[0] else {}
        for i in blocks[n].instructions:
            values.step(i, held)
        after[n] = held
        if found := question(blocks[n].instructions[-1]):
            asked[n] = (values.read(found[0], held), found[1])
    return asked


# ---- paths ---------------------------------------------------------------------------------------------------------

State = tuple[int, tuple[int, ...], tuple[bool | None, ...]]  # a block, what the path to it made, what it was answered


class Way(NamedTuple):
    """From one block to another. condition: the number of what is asked on the way, if that is followed; over: those
    that are not asked any more from there on."""

    to: int
    condition: int | None
    answer: bool
    over: list[int]


class Region:
    """A loop, or a kernel from its start to its end, whose paths are looked for."""

    def __init__(self, kernel: Kernel, loop: Loop | None, loops: Sequence[Loop]) -> None:
        blocks = self.blocks = kernel.blocks
        self.looped = loop is not None
        self.inside = loop.blocks if loop else frozenset(reachable(blocks))
        self.head = loop.head if loop else 0
        self.inner = [o for o in loops if o.blocks < self.inside or (loop is None and o.blocks <= self.inside)]
        self.back = {(n, o.head) for o in self.inner for n in o.blocks} | {(n, self.head) for n in self.inside}
        self.order = [n for n in reachable(blocks, self.head) if n in self.inside and not blocks[n].slow]
        self.slow_calls = sum(blocks[n].slow for n in self.inside)
        self.size = {n: sum(i.name != "NOP" for i in blocks[n].instructions) for n in self.order}
        self.nothing: tuple[bool | None, ...] = ()  # no answers

    def makes(self, wanted: Wanted) -> bool:
        """Whether all blocks together make as much."""
        together: Counter[str] = Counter()
        for n in self.order:
            together += self.blocks[n].labels
        have = (sum(together[label] for label in names.split("|")) for names in (*wanted.exactly, *wanted.at_least))
        return all(a >= b for a, b in zip(have, wanted.whole, strict=True))

    @functools.cached_property
    def ways(self) -> dict[int, list[Way]]:
        place = {n: k for k, n in enumerate(self.order)}
        asked = conditions(self.blocks, self.order, self.back)
        uses = Counter(condition for condition, _ in asked.values())
        tracked = [c for c, n in uses.most_common(MOST_TRACKED) if n > 1]
        known = {n: (tracked.index(c), answer) for n, (c, answer) in asked.items() if c in tracked}
        last = {c: max(place[n] for n, (k, _) in known.items() if k == c) for c in range(len(tracked))}
        self.nothing = (None,) * len(tracked)
        found: dict[int, list[Way]] = {}
        for n in self.order:
            following = self.blocks[n].following
            condition, of_target = known.get(n, (None, True)) if len(following) > 1 else (None, True)
            found[n] = [
                Way(to, condition, of_target == (k == 0), [c for c in last if last[c] < place[to]])
                for k, to in enumerate(following) if to in place and (n, to) not in self.back
            ]  # fmt: skip
        return found

    def steps(self, n: int, answers: tuple[bool | None, ...]) -> Iterator[tuple[int, tuple[bool | None, ...]]]:
        """The blocks that may follow, and the answers from there on."""
        for way in self.ways[n]:
            now, c = answers, way.condition
            if c is not None:
                if answers[c] is (not way.answer):
                    continue
                now = (*answers[:c], way.answer, *answers[c + 1 :])
            if any(now[c] is not None for c in way.over):
                now = tuple(None if c in way.over else a for c, a in enumerate(now))
            yield way.to, now

    def bounds(self, tallies: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[list[int], list[int]]]:
        """From each block to the end, itself left out: the least and the most of each label that a way makes."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for n in reversed(self.order):
            labels = range(len(tallies[n]))
            ways = [
                ([found[to][0][k] + tallies[to][k] for k in labels], [found[to][1][k] + tallies[to][k] for k in labels])
                for way in self.ways[n] if (to := way.to) in found
            ]  # fmt: skip
            if self.ends(n):
                ways.append(([0] * len(labels), [0] * len(labels)))
            if ways:
                found[n] = [min(w[0][k] for w in ways) for k in labels], [max(w[1][k] for w in ways) for k in labels]
        return found

    def ends(self, n: int) -> bool:
        """Whether a round, or the kernel, may end with this block."""
        return self.head in self.blocks[n].following if self.looped else self.blocks[n].instructions[-1].name == "EXIT"


MOST_TRACKED = 8  # conditions: each may double the paths that are looked at


def path(region: Region, wanted: Wanted, longest: bool = False) -> Path | None:
    """The path of one round that makes what is wanted, calls nothing and has the fewest instructions, the usual path;
    with ``longest`` the most, the longer side of every branch. A condition that is asked several times has one answer.
    None where there is no such path."""
    if not region.makes(wanted):
        return None
    weight = {n: wanted.rounds ** sum(n in o.blocks for o in region.inner) for n in region.order}
    tallies = {n: wanted.tally(region.blocks[n]) for n in region.order}
    bounds, exact = region.bounds(tallies), len(wanted.exactly)

    def promising(n: int, tally: tuple[int, ...]) -> bool:
        """Whether a way from here may still make what is wanted."""
        if n not in bounds:
            return False
        least, most = bounds[n]
        for k, (have, want) in enumerate(zip(tally, wanted.whole, strict=True)):
            if have + most[k] < want or (k < exact and have + least[k] > want):
                return False
        return True

    start = wanted.added((0,) * len(wanted.whole), tallies[region.head]) if region.head in tallies else None
    if start is None or not promising(region.head, start):
        return None
    better = operator.gt if longest else operator.lt
    first = (region.head, start, region.nothing)
    best: dict[State, float] = {first: weight[region.head] * region.size[region.head]}
    came: dict[State, State] = {}
    at: dict[int, list[State]] = {n: [] for n in region.order}
    at[region.head].append(first)
    for n in region.order:
        for state in at[n]:
            for to, answers in region.steps(n, state[2]):
                total = wanted.added(state[1], tallies[to])
                if total is None or not promising(to, total):
                    continue
                new, cost = (to, total, answers), best[state] + weight[to] * region.size[to]
                if new not in best:
                    at[to].append(new)
                elif not better(cost, best[new]):
                    continue
                best[new], came[new] = cost, state
    last: State | None = None
    for state in best:
        if state[1] == wanted.whole and region.ends(state[0]) and (last is None or better(best[state], best[last])):
            last = state
    if last is None:
        return None
    steps = [last]
    while steps[-1] in came:
        steps.append(came[steps[-1]])
    return _path(region, [n for n, *_ in reversed(steps)], weight)


def _path(region: Region, steps: Sequence[int], weight: Mapping[int, float]) -> Path:
    counts: Counter[str] = Counter()
    for n in steps:
        for i in region.blocks[n].instructions:
            if i.name == "NOP":
                continue
            counts[i.group] += weight[n]  # type: ignore[assignment]  # a Counter may hold floats
    return Path(counts, region.slow_calls, region.looped, tuple(steps))
