"""The shape of an answer: value, list, set, tuple, union or relation."""

import functools
import re
from dataclasses import dataclass, replace

from answers.spelling import parse_rows, squeeze


class Unreadable(ValueError):
    """Brackets that do not pair, or too many within each other: hostile text, not an answer."""


@dataclass(frozen=True)
class Answer:
    """The shape of a text.

    kind   value, list, set, tuple, union or relation. An interval, a ratio and a matrix are tuples.
           A solved inequality such as x > 2 is a union of one interval.
    text   the tidied text, without its label
    parts  items of a collection, sides of a relation
    mark   of a tuple: its two brackets, ":" for a ratio, or the lengths of a matrix's rows;
           of others: the signs between the parts
    label  what stood before "=" or "in", or ""
    """

    kind: str
    text: str
    parts: tuple = ()
    mark: object = ""
    label: str = ""


OPENING, CLOSING, SEPARATORS, RELATIONS = parse_rows(r"""
( [ { \{ \langle \lfloor \lceil
) ] } \} \rangle \rfloor \rceil
, ; \and \or
= < > \le \ge \ne \in \notin \approx \equiv \to \mapsto \subset \subseteq \Rightarrow \iff
""")
DEEPEST = 40  # brackets within brackets; a real answer has three or four
TOKEN = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\text\{[^{}]*\}|\\[a-zA-Z]+|\\.|.", re.S)
BRACKETED = re.compile(r"([(\[]|\\?\{|\\langle) *(.*?) *([)\]]|\\?\}|\\rangle)", re.S)
MATRIX = re.compile(
    r"([^&]*?)\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\2\}", re.S
)
FLIPPED = dict(parse_rows("< >\n> <\n\\le \\ge\n\\ge \\le"))

# What may stand before "=" and be left out: x, x_1, f(x), f'(2), (p,q), a:b, AB, AB/CD, |AB|,
# angle ABC, total area.
GREEK = "alpha|beta|gamma|delta|epsilon|eta|theta|kappa|lambda|mu|nu|rho|sigma|tau|phi|psi|omega"
GREEK += "|hbar|ell|Delta|Gamma|Omega|Phi"
INDEX = r"(?:_(?:\{[^{}]*\}|\w))?"
LETTER = rf"\\(?:vec|overline|hat|bar) *\{{[^{{}}]*\}}|\\(?:{GREEK})(?![a-zA-Z])|[a-df-zA-Z]"
SYMBOL = rf"(?:(?:{LETTER}){INDEX})"
AXES = {"x", "y", "z"}  # whose order is known
SYMBOLS = rf"{SYMBOL}(?: *, *{SYMBOL})*"
POINTS = rf"[A-Z]{{1,4}}{INDEX}"
QUANTITIES = """answer ans result solution value total sum difference product quotient remainder
area volume perimeter circumference length width height depth radius diameter side angle distance
speed velocity time age cost price profit probability number amount count mean median mode average
minimum maximum range slope ratio rate degree mass weight"""
QUANTITY = (
    rf"(?:(?:the|final|total|average|required|minimum|maximum) )*(?:{'|'.join(QUANTITIES.split())})"
)
LABEL = re.compile(
    rf"{SYMBOL}(?:(?:'*|\^\{{ ?-1 ?\}}) *\( *(?:{SYMBOLS}|-?[0-9]+) *\))?"
    rf"|\( *{SYMBOLS} *\)|{SYMBOL}(?: *: *{SYMBOL})+"
    rf"|(?!NO)[A-Z]{{2}}{INDEX}|{POINTS} */ *{POINTS}|\\frac\{{ *{POINTS} *\}}\{{ *{POINTS} *\}}"
    rf"|\| *{POINTS} *\||(?:m *)?\\(?:angle|triangle) *{POINTS}"
    rf"|(?i:{QUANTITY}|\\text *\{{ *{QUANTITY} *\}})"
)
CHOICE = re.compile(r"[A-Z]+ *(?:=|\\in) *(?:[A-Z]{1,4}|\\text *\{[^{}]*\}|[a-zA-Z]{3,})")  # A = B


def scan(text):
    """The tokens of a text. A bracket and all that it holds is one token."""
    tokens, depth = [], 0
    for match in TOKEN.finditer(text):
        token = match[0]
        if depth:
            tokens[-1] += token
        else:
            tokens.append(token)
        depth += (token in OPENING) - (token in CLOSING)
        if not 0 <= depth <= DEEPEST:
            raise Unreadable
    if depth:
        raise Unreadable
    return tokens


def split(tokens, separators):
    """Parts between the separators, and the separators found."""
    parts, found = [""], []
    for token in tokens:
        if token in separators:
            parts.append("")
            found.append(token)
        else:
            parts[-1] += token
    return [part.strip(" ") for part in parts], found


@functools.lru_cache(maxsize=4096)
def read(text):
    """The shape of a tidied text."""
    parts, found = split(scan(text), SEPARATORS)
    parts = [part for part in parts if part]  # "a, and b" has an empty one
    if len(parts) < 2:
        return read_item("".join(parts))
    items = [read_item(part) for part in parts]
    labels = {item.label for item in items} - {""}
    if len(labels) > 1:
        names = {re.sub(INDEX + "$", "", item.label) for item in items}
        if len(names) < len(items):  # x_1=1, x_2=2: the values of x in any order
            return Answer("list", text, tuple(items))
        if labels <= AXES:  # their order is known, of others it is the written one
            items.sort(key=lambda item: item.label)
        return Answer("tuple", text, tuple(items), "()")
    label = "".join(labels)
    marks = {mark for item in items for mark in item.mark}
    ranges_alone = {item.kind for item in items} == {"union"} and r"\setminus" not in marks
    if ranges_alone and set(found) == {r"\or"}:  # x < 2 or x > 3
        ranges = tuple(part for item in items for part in item.parts)
        return Answer("union", text, ranges, (r"\cup",) * (len(ranges) - 1), label)
    opened = []  # \pm has made lists
    for item in items:
        opened += item.parts if item.kind == "list" else [replace(item, label="")]
    return Answer("list", text, tuple(opened), label=label)


def read_item(text):
    """The shape of a text without separators outside brackets."""
    tokens = scan(text)
    sides, signs = split(tokens, RELATIONS)
    if signs:
        return read_relation(text, sides, signs)
    sides, signs = split(tokens, (r"\cup", r"\setminus"))
    if signs:
        return Answer("union", text, tuple(map(read, sides)), tuple(signs))
    matrix = MATRIX.fullmatch(text)
    if matrix:
        return read_matrix(text, matrix[1], matrix[3])
    bracketed = BRACKETED.fullmatch(text) if len(tokens) == 1 else None
    if bracketed:
        return read_bracketed(text, *bracketed.groups())
    if re.search(r"\\(pm|mp)(?![a-zA-Z])", text):
        plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
        minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return Answer("list", text, (read(plus), read(minus)))
    sides, signs = split(tokens, ":")
    if signs:
        return Answer("tuple", text, tuple(map(read, sides)), ":")
    return Answer("value", text)


def read_relation(text, sides, signs):
    label, value = sides[0], sides[-1]
    if signs in (["="], [r"\in"]) and LABEL.fullmatch(label) and not CHOICE.fullmatch(text):
        shape = read(value)
        names = label.strip("() ").split(",")
        if shape.kind == "tuple" and len(names) == len(shape.parts):  # (x,y)=(1,2): x=1, y=2
            names = [squeeze(name.strip(" ")) for name in names]
            items = [replace(part, label=name) for part, name in zip(shape.parts, names)]
            if set(names) <= AXES:
                items.sort(key=lambda item: item.label)
            shape = replace(shape, parts=tuple(items))
            label = f"({','.join(sorted(names))})"
        return replace(shape, label=squeeze(label))
    if signs[0] in (">", r"\ge"):
        sides = sides[::-1]
        signs = [FLIPPED.get(sign, sign) for sign in signs[::-1]]
    return read_inequality(sides, signs) or Answer(
        "relation", text, tuple(map(read, sides)), tuple(signs)
    )


def read_inequality(sides, signs):
    r"""The interval of a < x \le b or x < a, as a union with the label x, else None."""
    if not set(signs) <= {"<", r"\le"}:
        return None
    if LABEL.fullmatch(sides[0]):
        sides, signs = [r"-\infty", *sides], ["<", *signs]
    if LABEL.fullmatch(sides[-1]):
        sides, signs = [*sides, r"\infty"], [*signs, "<"]
    if [bool(LABEL.fullmatch(side)) for side in sides] != [False, True, False]:
        return None
    low, name, high = sides
    left = "(" if signs[0] == "<" else "["
    right = ")" if signs[1] == "<" else "]"
    text = f"{left}{low},{high}{right}"
    return Answer("union", text, (read(text),), label=squeeze(name))


def read_matrix(text, factor, inside):
    """All cells in one tuple, marked by the lengths of the rows."""
    rows = [row.split("&") for row in inside.split(";") if row.strip(" ")]
    cells = []
    for row in rows:
        cells += [read(f"({factor})({cell})" if factor else cell) for cell in row]
    return Answer("tuple", text, tuple(cells), tuple(map(len, rows)))


def read_bracketed(text, left, inside, right):
    if left == "{":
        return read(inside)
    if left == r"\{":
        condition = re.fullmatch(r"(.*?) ?(?:\\mid|\||:) ?(.*)", inside)
        if condition:  # {x : x > 2}
            item = read(condition[2])
            if item.kind == "union" and item.label == condition[1]:
                return item
        items = read(inside) if inside else Answer("list", "")
        return Answer("set", text, items.parts if items.kind == "list" else (items,))
    parts, _ = split(scan(inside), ",;")
    if len(parts) == 1 and (left == "(" or inside.startswith(r"\begin")):
        return read(inside)
    mark = "()" if left == r"\langle" else left + right
    return Answer("tuple", text, tuple(map(read, parts)), mark)
