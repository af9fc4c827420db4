r"""Are two answers the same? The rules around math-verify: `equal(gold, answer)`.

math-verify judges single expressions and equations. What a policy could abuse is decided here, in three steps:

1. `tidy` gives both texts one spelling (Unicode, fonts, spaces, fractions).
2. `read` finds the shape: list or set, tuple, interval, union, matrix, relation, labelled or plain value. Shapes must
   agree, so a list of candidates or an interval around the answer is never the answer.
3. Plain values are compared exactly: fractions as fractions, other numbers to more digits than were written, words as
   words, units by name; only expressions with variables and equations are left to math-verify's algebra.

Equality is that of mathematics, with these conventions: a label (x=, f(x)=), a unit or a currency may be left out;
p\% is p or p/100; order does not matter in a list or set; an unevaluated integral, sum, limit, maximum... only equals
itself. Hostile text may take `equal` for ever: rewards.py calls it in a process that can be killed. `tidy`, `quantity` and
`number` take time linear in a text, give or take, and are also called outside.
"""

import functools
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------- spelling

SYMBOLS = {
    "−": "-",
    "–": "-",
    "﹣": "-",
    "＋": "+",
    "×": r"\times ",
    "⋅": r"\cdot ",
    "·": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "＝": "=",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∅": r"\emptyset ",
    "∞": r"\infty ",
    "π": r"\pi ",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "∫": r"\int ",
    "∨": r"\lor ",
    "∧": r"\land ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "′": "'",
    "’": "'",
    "…": r"\ldots ",
    "，": ",",
    "：": ":",
    "％": r"\%",
    "∶": ":",
    "“": '"',
    "”": '"',
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "σ": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "ε": r"\epsilon ",
    **dict.fromkeys(
        "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000\n\r\t",
        " ",
    ),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
}
VULGAR = {
    "½": "12",
    "⅓": "13",
    "⅔": "23",
    "¼": "14",
    "¾": "34",
    "⅕": "15",
    "⅖": "25",
    "⅗": "35",
    "⅘": "45",
    "⅙": "16",
    "⅚": "56",
    "⅐": "17",
    "⅛": "18",
    "⅜": "38",
    "⅝": "58",
    "⅞": "78",
    "⅑": "19",
}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
MACROS = {  # other names of the same thing
    "dfrac": r"\frac",
    "tfrac": r"\frac",
    "cfrac": r"\frac",
    "leq": r"\le ",
    "leqq": r"\le ",
    "leqslant": r"\le ",
    "geq": r"\ge ",
    "geqq": r"\ge ",
    "geqslant": r"\ge ",
    "neq": r"\ne ",
    "lt": "<",
    "gt": ">",
    "vee": r"\lor ",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "lbrack": "[",
    "rbrack": "]",
    "varnothing": r"\emptyset ",
    "backslash": r"\setminus ",
    "degree": r"^\circ ",
    "degrees": r"^\circ ",
    "thinspace": " ",
    "medspace": " ",
    "quad": " ; ",
    "qquad": " ; ",
    "newline": " ; ",
    "textnormal": r"\text",
    "textbf": r"\text",
    "textit": r"\text",
    "textrm": r"\text",
    "mathrm": r"\text",
    "textsf": r"\text",
    "texttt": r"\text",
    "mbox": r"\text",
    "hbox": r"\text",
    "emph": r"\text",
    **dict.fromkeys(
        [
            "left",
            "right",
            "big",
            "Big",
            "bigg",
            "Bigg",
            "bigl",
            "bigr",
            "Bigl",
            "Bigr",
            "biggl",
            "biggr",
            "displaystyle",
            "textstyle",
            "limits",
            "nolimits",
        ],
        " ",
    ),
    **dict.fromkeys(
        ["mathbf", "mathit", "mathsf", "boldsymbol", "bm", "pmb", "mathnormal", "bf", "it", "rm"],
        " ",
    ),  # blanks: they glue no digits
}
RESPELLED = {  # pattern -> spelling, in this order
    r"\\\$": " dollars_ ",
    r"\\[()\[\]]|\$": " ",  # delimiters of math mode
    r"\\not *=": r"\\ne ",
    r"\\not *\\in(?![a-zA-Z])": r"\\notin ",
    r"\\(?:left|right) ?\.": "",
    r"(?<=\d)(?:\{,\}|,?\\[,!]) ?(?=\d{3}(?!\d))": "",  # thousands; a plain comma may also part a list: see `read`
    r"\\[,:;>! ]|~": " ",
    r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm) *\{ *([a-zA-Z]) *\}": r" \1 ",
    r"\\(?:mathrm|textrm) *\{ *([deixyz]) *\}": r" \1 ",  # other letters may be units
    r"\\([a-zA-Z]+)": lambda m: MACROS.get(m[1], m[0]),
    r"\\text +(?=\{)": r"\\text",
    r"\^\{ *\\circ *\}": r"^\\circ",
    r"\\(sin|cos|tan|cot|sec|csc) *\(? ?([0-9.]+) ?\^\\circ ?\)?": r"\\\1(\\frac{\2\\pi}{180})",
    r"\^ *(?:\\prime|\{ *\\prime *\})": "'",
    r"\{([^{}]*)\\choose([^{}]*)\}": r"\\binom{\1}{\2}",
    r"\\(sqrt|frac) +(?=[\d{])": r"\\\1",
    r"\\frac(\d)(\d)": r"\\frac{\1}{\2}",
    r"\\frac(\d)\{": r"\\frac{\1}{",
    r"\\frac(\{[^{}]*\})(\d)": r"\\frac\1{\2}",
    r"\\sqrt(\d)": r"\\sqrt{\1}",
    r"(?<=[.\d])\\(?:overline|dot) ?\{? ?(\d+) ?\}?(?!\d|\\dot)": r"\\overline{\1}",
    r"\\frac\{ ?\\text\{([^{}]*)\} ?\}\{ ?\\text\{([^{}]*)\} ?\}": r"\\text{\1/\2}",  # of units
    r"([_^])\{ ?(\w) ?\}(?!\w)": r"\1\2",
}
RESPELLED = {re.compile(pattern): spelling for pattern, spelling in RESPELLED.items()}
JOINED = re.compile(
    r"\\text *\{ *,? *(?P<text>and|or) *,? *\}|(?P<inner>\\text *\{[^{}]*\})|(?<=[ \d}),])(?P<bare>and|or)(?=[ \d\\(])"
)


class TooDeep(ValueError):
    """Brackets within brackets within brackets: hostile text, not an answer."""


def tidy(text):
    """One spelling for what means the same. Control characters stay, and make the text equal to nothing."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", lambda m: f"^{{{m[0].translate(RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+", lambda m: f"_{{{m[0].translate(LOWERED)}}}", text)
    text = re.sub("√ *([0-9.]+|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"√ *\(([^()]*)\)", r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    text = "".join(
        rf"\frac{{{VULGAR[c][0]}}}{{{VULGAR[c][1]}}}" if c in VULGAR else SYMBOLS.get(c, c)
        for c in text
    )
    rows = r"\cr " if r"\begin" in text else " ; "
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", lambda _: rows, text)
    for pattern, spelling in RESPELLED.items():
        text = pattern.sub(spelling, text)
    text = JOINED.sub(lambda m: m["inner"] or rf" \{m['text'] or m['bare']} ", text)
    text = re.sub(" +", " ", text).strip(" ").rstrip(",;: ")
    return text[:-1].rstrip(",;: ") if re.search(r"(?<!\.)\.$", text) else text  # an ellipsis stays


# ------------------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True)
class Answer:
    """What a text turned out to be.

    kind   value, list, set, tuple (an interval too), union, matrix or relation
    text   as it was written, tidied and without its label
    parts  items of a collection, sides of a relation
    mark   brackets of a tuple or interval, signs of a relation, rows of a matrix
    label  what stood before "=" or "in", or ""
    """

    kind: str
    text: str
    parts: tuple = ()
    mark: object = ""
    label: str = ""


OPEN, CLOSE = (
    ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"),
    (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"),
)
TOKEN = re.compile(
    r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\text\{[^{}]*\}|\\[a-zA-Z]+|\\.|[<>]=|.", re.DOTALL
)
RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    r"\le": "<=",
    r"\ge": ">=",
    "<=": "<=",
    ">=": ">=",
    r"\ne": "!=",
    r"\in": "in",
    r"\notin": "out",
    r"\approx": "~",
    r"\equiv": "mod",
    r"\to": "->",
    r"\mapsto": "->",
    r"\subset": "sub",
    r"\subseteq": "sube",
    r"\Rightarrow": "=>",
    r"\iff": "<=>",
}
SEPARATORS = (",", ";", r"\lor", r"\and", r"\or")
DEEPEST = 40  # brackets within brackets; a real answer has three or four


def split(text, separators):
    """Cut at the separators that stand outside all brackets: parts, and the separators between them."""
    parts, found, depth, start = [], [], 0, 0
    for match in TOKEN.finditer(text):
        token = match.group()
        depth += (token in OPEN) - (token in CLOSE)
        if depth > DEEPEST:
            raise TooDeep
        if depth <= 0 and token in separators:
            parts.append(text[start : match.start()])
            found.append(token)
            start = match.end()
    return [p.strip(" ") for p in (*parts, text[start:])], found


LETTERS = "alpha beta gamma delta epsilon eta theta kappa lambda mu nu rho sigma tau phi psi omega hbar ell Delta Gamma Omega Phi"
GREEK = rf"\\(?:{LETTERS.replace(' ', '|')})(?![a-zA-Z])"
INDEX = r"(?:_(?:\{[^{}]*\}|\w))?'*"
POINTS = rf"[A-Z]{{1,4}}{INDEX}"  # a variable, a segment AB, a triangle ABC
SYMBOL = rf"(?:\\(?:vec|overline|hat|bar) *\{{[^{{}}]*\}}|\\text *\{{[a-zA-Z ]*\}}|{GREEK}|[A-Z]{{2,4}}|[a-df-zA-Z]|[a-zA-Z]{{4,}}){INDEX}"
SYMBOLS_LIST = rf"{SYMBOL}(?: *, *{SYMBOL})*"
LABEL = re.compile(  # what may stand before "=" and be left out: x, f(x), P(A), (p,q), a:b, AB/CD, |AB|, angle ABC
    rf"(?:{SYMBOL}|{SYMBOL} *\( *(?:{SYMBOLS_LIST}|[0-9]+) *\)|\( *{SYMBOLS_LIST} *\)|{SYMBOL}(?: *: *{SYMBOL})+|{POINTS} */ *{POINTS}"
    rf"|\\frac\{{ *{POINTS} *\}}\{{ *{POINTS} *\}}|\| *{POINTS} *\||(?:m *)?\\angle *{POINTS}|\\triangle *{POINTS})"
)
QUANTITY = re.compile(  # words that only name a value: the answer, total cost, number of apples
    r"(?:(?:the|final|total|average|required|minimum|maximum) )*(?:answer|ans|result|solution|value|total|sum|difference|product|quotient|remainder|area|volume"
    r"|perimeter|circumference|length|width|height|depth|radius|diameter|side|angle|distance|speed|velocity|time|age|cost|price|profit|probability|number|amount"
    r"|count|mean|median|mode|average|minimum|maximum|range|slope|ratio|rate|degree|mass|weight)(?: of (?:the )?(?P<counted>[a-z]+))?",
    re.IGNORECASE,
)


def names_only(label, value):
    """Whether a label that the gold answer lacks says nothing but a name. A word may mean more (NOT=4, twice x=4), or be an
    answer itself, as a point may where the value is one (A=B)."""
    if re.search(r"\\text|(?<![\\a-zA-Z])[a-zA-Z]{3,}|no", label, re.IGNORECASE) and not re.match(
        r"(?:m *)?\\(?:angle|triangle)", label
    ):
        found = QUANTITY.fullmatch(re.sub(r"\\text|[{}]", " ", label).strip(" "))
        return bool(found) and (
            not found["counted"] or unit_name(found["counted"], False)[0] is not None
        )
    return not re.fullmatch(rf"(?:{SYMBOL})'+", label) and not (
        re.fullmatch(POINTS, label) and re.fullmatch(rf"{POINTS}|\\text.*|[a-zA-Z]{{3,}}", value)
    )


@functools.lru_cache(maxsize=4096)
def read(text, thousands):
    """The shape of a tidied text. thousands: a plain comma before three digits is no separator: 1,234 is one number."""
    if thousands:
        text = re.sub(
            r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text
        )
    parts, found = split(text, SEPARATORS)
    parts = [p for p in parts if p]  # "a, and b" has an empty one
    if len(parts) > 1:
        items = [read(p, False) for p in parts]
        ranges = [as_interval(item) for item in items if item.kind == "relation"]
        if (
            len(ranges) == len(items) and all(ranges) and set(found) <= {r"\or", r"\lor"}
        ):  # x < 2 or x > 3
            if len({variable(item) for item in items}) == 1:
                return Answer(
                    "union", text, tuple(ranges), (r"\cup",) * len(found), variable(items[0])
                )
        return read_list(items, text)
    return read_item(parts[0] if parts else text)


def read_list(items, text):
    """A bare list. x=1, 2, 3 and x=1, x=2, x=3 are lists with a label; \\pm has been opened."""
    labels = [item.label for item in items]
    if len(set(labels)) == 1 or not any(labels[1:]):
        items = [replace(item, label="") for item in items]
        label = labels[0]
    else:
        label = ""
    opened = [part for item in items for part in (item.parts if item.kind == "list" else (item,))]
    return Answer("list", text, tuple(opened), label=label)


def read_item(text):
    sides, signs = split(text, RELATIONS)
    if signs:
        signs = tuple(RELATIONS[s] for s in signs)
        label, value = sides[0], sides[-1]
        if signs == ("=",) and not label:  # "= 5"
            return read(value, False)
        if set(signs) <= {"=", "in"} and LABEL.fullmatch(label) and value:
            if len(sides) == 2:
                return replace(read(value, False), label=squeeze(label))
            return Answer(
                "relation",
                " = ".join(sides[1:]),
                tuple(read(s, False) for s in sides[1:]),
                signs[1:],
                squeeze(label),
            )
        return Answer(
            "relation",
            text,
            tuple(read(s, False) if s else Answer("value", s) for s in sides),
            signs,
        )
    sides, signs = split(text, (r"\cup", r"\setminus"))
    if signs:
        return Answer("union", text, tuple(read(s, False) for s in sides), tuple(signs))
    matrix = re.fullmatch(
        r"([^&]*?)\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\2\}", text
    )
    if matrix:
        factor, kind, inside = matrix.groups()
        rows = [row.split("&") for row in re.split(r"\\cr(?![a-zA-Z])", inside) if row.strip(" ")]
        cells = [
            f"({factor})({cell})" if factor else cell.strip(" ") for row in rows for cell in row
        ]
        return Answer(
            "matrix",
            text,
            tuple(read(c, False) for c in cells),
            kind if kind[0] in "vV" else tuple(map(len, rows)),
        )
    for left in ("(", "[", r"\{", r"\langle"):
        inner = enclosed(text, left)
        if inner is not None:
            return read_enclosed(text, left, *inner)
    if enclosed(text, "{"):
        return read(text[1:-1].strip(" "), False)
    if re.search(r"\\(pm|mp)(?![a-zA-Z])", text):
        plus, minus = (
            text.replace(r"\pm", sign).replace(r"\mp", other) for sign, other in ("+-", "-+")
        )
        return Answer(
            "list",
            text,
            (Answer("value", plus.removeprefix("+").strip(" ")), Answer("value", minus)),
        )
    return Answer("value", text)


def enclosed(text, left):
    """(inside, closing bracket) if one pair of brackets holds the whole text, else None."""
    if not text.startswith(left):
        return None
    depth = 0
    for match in TOKEN.finditer(text):
        depth += (match.group() in OPEN) - (match.group() in CLOSE)
        if depth == 0:
            return (
                (text[len(left) : match.start()].strip(" "), match.group())
                if match.end() == len(text)
                else None
            )


def read_enclosed(text, left, inside, right):
    if (left, right) == (r"\{", r"\}"):
        found = re.fullmatch(r"(.*?) ?(?:\\mid|\||:) ?(.*)", inside)
        if found:  # a set by its condition
            item = read(found[2], False)
            return (
                item
                if item.kind == "relation" and as_interval(item) and variable(item) == found[1]
                else Answer("value", text)
            )
        items = read(inside, False) if inside else Answer("list", "")
        parts = items.parts if items.kind == "list" else (items,)
        return Answer("set", text, parts, label=items.label)
    parts, _ = split(inside, (",", ";"))
    if len(parts) == 1 and (left, right) in (("(", ")"), ("[", "]")):
        item = read(inside, False)
        return (
            item if left == "(" or item.kind == "matrix" else Answer("tuple", text, (item,), "[]")
        )
    items = tuple(read(p, False) for p in parts)
    if left == r"\langle":
        return Answer("tuple", text, items, "()")
    return Answer("tuple", text, items, left + right)


# ------------------------------------------------------------------------------------------------------------ values

PREFIXES = {
    "n": "nano",
    "µ": "micro",
    "μ": "micro",
    "m": "milli",
    "c": "centi",
    "k": "kilo",
    "M": "mega",
    "G": "giga",
    "": "",
}
SI = {
    "m": "meter metre",
    "g": "gram",
    "s": "second sec",
    "L": "liter litre",
    "l": "liter",
    "N": "newton",
    "Pa": "pascal",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "A": "ampere amp",
    "Hz": "hertz",
    "eV": "electronvolt",
    "mol": "mole",
    "K": "kelvin",
    "T": "tesla",
    "C": "coulomb",
    "cal": "calorie",
}
OTHERS = (
    "in=inch inches",
    "ft=foot feet",
    "yd=yard",
    "mi=mile",
    "min=minute",
    "h=hour hr",
    "day",
    "week",
    "month",
    "yr=year",
    "lb=pound",
    "oz=ounce",
    "gal=gallon",
    "ton tonne",
    "deg=degree",
    "rad=radian",
    "dollar usd USD",
    "cent",
    "euro eur EUR €",
    "sterling £",
    "yen ¥",
    "percent",
    "acre",
    "hectare",
    "erg",
    "atm",
    "gauss",
    "angstrom",
    "ohm",
)
UNITS = {}  # spelling -> name
for symbol, names in SI.items():
    for prefix, word in PREFIXES.items():
        name = word + names.split()[0]
        UNITS |= {prefix + symbol: name} | {
            word + n + plural: name for n in names.split() for plural in ("", "s")
        }
for names in OTHERS:
    symbol, _, names = names.rpartition("=")
    UNITS |= {
        n + plural: names.split()[0]
        for n in (*symbol.split(), *names.split())
        for plural in ("", "s")
    }
UNITS |= {"mph": "mile / hour", "kph": "kilometer / hour", "kmh": "kilometer / hour"}
CURRENCY = {"dollars_": "dollar", "€": "euro", "£": "sterling", "¥": "yen"}
NO_UNITS = re.compile(  # words that make another number of the one before them, or take it back
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:twen|thir|four|for|fif|six|seven|eigh|nine)(?:teen|t[yi])"
    r"|hundred|thousand|[a-z]+illion|lakh|crore|dozen|score|pair|couple|half|halv|third|quarter|fif|nin|twelf|doubl|tripl|quadrupl|factorial"
    r"|reciprocal|negat[a-z]*|opposit|invers)(?:e?s|e?ths?|e?d|e)?|squared|cubed|(?:un|in|dis|non)?(?:equal|correct|true|valid)s?|wrong|right"
    r"|false|not?|nor|xor|never|none|neither|nope|yes|less|fewer|more|least|most|under|over|above|below|plus|minus|times|twice|thrice|versus"
    r"|and|or|but|if|is|are|maybe|perhaps|else|otherwise|instead|where|for|when|about|nearly|almost|mod|base|to|through",
    re.IGNORECASE,
)
COUNTED = re.compile(
    r".*[^sui]s|people|persons?|(?:wo)?men|children|mice|geese|teeth|fish|sheep|deer|dice",
    re.IGNORECASE,
)  # plurals
UNIT_WORD = (
    r"(?:\\text *\{(?:[^{}]|\{[^{}]*\})*\}|(?<=[ /])[a-zA-Z]{2,}\.?)(?: *\^ *\{?-?[0-9]\}?)?"
)
UNIT = re.compile(
    rf"(.*?[\w}})!]) *((?: *{UNIT_WORD})(?:(?: *(?:/|\\cdot))? *{UNIT_WORD})*|\^\\circ *(?:[CFK]|\\text *\{{ *[CFK] *\}})?)$"
)


def quantity(text, trusted=False):
    r"""(text without its unit, unit or None, whether it was followed by a percent sign). trusted: as in `unit_name`."""
    core, unit = text, None
    money = re.fullmatch(r"(-?) *(dollars_|[€£¥]) *(.+)", text) or re.fullmatch(
        r"()(.+?) *(dollars_|[€£¥])", text
    )
    if money:
        symbol, amount = sorted(money.groups()[1:], key=lambda part: part not in CURRENCY)
        core, unit = money[1] + amount, CURRENCY[symbol]
    percent = re.fullmatch(r"(.+?) *(?:\\?%|(?:\\text *\{ *)?\bper ?cent\b(?: *\})?)", core)
    if percent:
        return percent[1], unit, True
    found = UNIT.fullmatch(core) if not unit else None
    if found:
        value = number(found[1])
        name, known = unit_name(found[2], trusted or value == 1)
        if name and (value is not None or known and re.search(r"[0-9]|\\(?!text)", found[1])):
            core, unit = found[1], name
    return core, unit, False


def unit_name(text, trusted):
    """(one name for a unit however it is spelled, such as km/h and kilometers per hour; whether all of it is known).

    Up to two unknown words are what is counted, the last one a plural (red apples) unless they are trusted, as a gold
    answer's are; None: something else.
    """
    text = re.sub(r"\\text|[{}]", " ", text.replace(r"^\circ", " degree ").replace(r"\cdot", " "))
    for pattern, spelling in (
        (r"\bper\b|/", " / "),
        (r"\bsq(?:uared?)?\b\.? *(\w+)", r"\1 2"),
        (r"\bcubic (\w+)", r"\1 3"),
        (r"(\w+) ?\^ ?-1\b", r"/ \1"),
        (r"(\w+) ?\^ ?-([2-9])\b", r"/ \1 \2"),
    ):
        text = re.sub(pattern, spelling, text)
    if re.search(r"[^a-zA-ZµμÅ€£¥0-9/^. -]|(?<![\^a-zA-Z-] )(?<![\^a-zA-Z-])[0-9]", text):
        return None, False
    parts = re.findall(r"[^\W\d]+|[€£¥]|-?[0-9]|/", text)
    names = [UNITS.get(p) or (UNITS.get(p.lower()) if len(p) > 3 else None) or p for p in parts]
    unknown = [
        p.lower()
        for p, n in zip(parts, names)
        if p == n and p not in UNITS and p[0] not in "-/0123456789"
    ]
    if (
        not parts
        or len(unknown) > 2
        or any(len(p) < 3 or NO_UNITS.fullmatch(p) for p in unknown)
        or (unknown and not trusted and not COUNTED.fullmatch(unknown[-1]))
    ):
        return None, False
    return " ".join(
        n.lower().removesuffix("s") if n.lower() in unknown else n for n in names
    ), not unknown


DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
DIGITS = 2500  # to which irrational numbers are compared: more than can be written
MAX_EXPONENT = 4000  # of ten: exact arithmetic beyond takes long; sympy decides, within its time


def number(text):
    """An exact Fraction if the text is an integer, decimal, fraction, mixed number, a x 10^b or 0.\\overline{3}, else None."""
    text = re.sub(r" +", " ", text).strip(" ")
    sign = 1
    while text[:1] in ("-", "+") or (enclosed(text, "(") or enclosed(text, "{")):
        if text[0] in "-+":
            sign, text = sign * (-1 if text[0] == "-" else 1), text[1:].strip(" ")
            if text[:1] in ("-", "+"):
                return None
        else:
            text = text[1:-1].strip(" ")
    if re.fullmatch(DECIMAL, text):
        return sign * Fraction(text)
    m = re.fullmatch(
        rf"(\d+)? ?\\frac *\{{ ?(-?{DECIMAL}) ?\}} ?\{{ ?(-?{DECIMAL}) ?\}}", text
    ) or re.fullmatch(rf"(?:(\d+) )?({DECIMAL}) ?/ ?(-?{DECIMAL})", text)
    if m:
        top, bottom = Fraction(m[2]), Fraction(m[3])
        if bottom == 0 or (m[1] and (top < 0 or bottom < 0)):
            return None
        return sign * (int(m[1] or 0) + top / bottom)
    m = re.fullmatch(r"(\d*)\.(\d*)\\overline *\{ ?(\d+) ?\}", text)
    if m:
        whole, start, cycle = m[1] or "0", m[2], m[3]
        return sign * (
            Fraction(int(whole + start), 10 ** len(start))
            + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(start))
        )
    m = re.fullmatch(rf"({DECIMAL})[eE](\d+|[+-]\d\d+)", text) or re.fullmatch(
        rf"(?:({DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?)?10 ?\^ ?(?:\{{ ?([+-]?\d+) ?\}}|(\d)$)", text
    )
    if m:
        power = int(next(g for g in m.groups()[1:] if g))
        return (
            sign * Fraction(m[1] or 1) * Fraction(10) ** power
            if abs(power) <= MAX_EXPONENT
            else None
        )


BASE = re.compile(r"\(?([0-9A-F]+)\)? ?_ ?\{? ?(\d+|\\text *\{[^{}]*\}) ?\}?")  # 1011_2
FUNCTIONS = [
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "sinh",
    "cosh",
    "tanh",
    "log",
    "ln",
    "exp",
    "lg",
    "sqrt",
    "frac",
]


def words(text, certainly=False):
    """The text as plain words if that is what it is, else None: text macros and case do not matter, nor do articles."""
    plain = re.sub(r"\\text *\{([^{}]*)\}", r" \1 ", text)
    marked = (
        plain != text
        or re.search(r"[a-zA-Z]{4,}", re.sub(r"\\[a-zA-Z]+", "", plain))
        and not any(f in plain for f in FUNCTIONS)
    )
    plain = " ".join(re.sub(r"""["'.()]""", " ", plain).split())
    if not certainly and (not marked or "\\" in plain):
        return None
    return plain if len(plain) == 1 else re.sub(r"\b(?:an?|the) (?=\w)", "", plain.casefold())


RESTATING = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim(?:sup|inf)?|partial|det|max|min|sup|inf|gcd|ldots|cdots|dots|underset|overset|[bp]?mod"
    r"|[hv]?phantom)(?![a-zA-Z])"
    r"|\.\.\.|\\frac\{d\}\{d\w\}|\\begin\{[vV]matrix\}|\\operatorname|\b(?:max|min|det|lim|gcd|lcm)\b"
)


def same_value(gold, answer):
    """Two plain values, by exact arithmetic where there is no variable."""
    g, a = BASE.fullmatch(gold), BASE.fullmatch(answer)
    if g or a:
        return bool(g and a and g[1].lstrip("0") == a[1].lstrip("0") and g[2] == a[2])
    (g, g_unit, g_percent), (a, a_unit, a_percent) = quantity(gold, trusted=True), quantity(answer)
    g_unit, a_unit = g_unit or g_percent and "percent", a_unit or a_percent and "percent"
    if g_unit and a_unit and g_unit != a_unit or "" in (g, a):
        return False
    if g_percent != a_percent:  # p% is p and p/100
        share, other = (g, a) if g_percent else (a, g)
        part = number(share)
        return same_value(share, other) or same_value(
            rf"\frac{{{share}}}{{100}}" if part is None else str(part / 100), other
        )
    if squeeze(g) == squeeze(a):
        return True
    x, y = number(g), number(a)
    if x is not None and y is not None:
        return x == y
    if ":" in g or ":" in a:
        return same_ratio(g, a)
    if words(g) is not None or words(a) is not None:
        return words(g, True) == words(a, True)
    return same_expression(g, a)


def squeeze(text):
    """Without the blanks that part nothing."""
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


def same_ratio(gold, answer):
    g, a = (
        [number(part) for part in re.split(r":|(?<=\d)/(?=\d)", text)] for text in (gold, answer)
    )
    if None in g or None in a or len(g) != len(a):
        return False
    if (
        re.fullmatch("[0-9]{1,2}:[0-5][0-9]", gold) and math.gcd(*map(int, g)) > 1
    ):  # a time of day: no ratio is written so
        return False
    return all(x * a[0] == y * g[0] for x, y in zip(g, a)) and all(
        x != 0 or y == 0 for x, y in zip(g, a)
    )


# ------------------------------------------------------------------------------------------------------- expressions


@functools.lru_cache(maxsize=4096)
def expression(text):
    """sympy's reading of a LaTeX text, decimals as fractions; None if it is not mathematics as a whole."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if re.search(
        r"(?<![_^])\d +\d|\\text|[?!]{2}|[0-9]'|[@#%&\"]|[+\-]{3}|[^ -~]", text
    ) or not re.search(r"\w", text):
        return None  # neighbours that the parser would add up, words, tricks, look-alikes
    text = re.sub(
        r"\\Gamma(?![a-zA-Z_])", "G_{amma}", text
    )  # the parser would take it for \gamma, I for i, and 2E+1 for 20
    text = re.sub(r"(?<![a-zA-Z_\\])(?<!_\{)I(?![a-zA-Z_])", "N_{I}", text)
    text = re.sub(r"(?<=\d)E(?=[+-]\d)", " E ", text)
    text = re.sub(
        r"(?<=[\w})])'+", lambda m: "_{" + "p" * len(m[0]) + "}", text
    )  # the parser drops primes
    try:
        parsed = latex2sympy(
            text,
            conversion_config=ConversionConfig(lowercase_symbols=False),
            normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"),
        )
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser's many ways to say that this is no mathematics
        return None
    parsed = parsed.xreplace({f: sympy.Rational(str(f)) for f in parsed.atoms(sympy.Float)})
    parsed = parsed.xreplace(
        {x: sympy.Symbol(x.name + "_") for x in parsed.free_symbols if x.name != x.name.lower()}
    )  # math-verify ignores case
    return evaluated(parsed) if isinstance(parsed, sympy.Expr) else parsed


def evaluated(expression):
    """The parser leaves 1/3/3 as it was written, and evalf takes time exponential in such a depth."""
    return expression.func(*map(evaluated, expression.args)) if expression.args else expression


def same_expression(gold, answer):
    """Exactly equal for every value of the variables, which must be the same ones."""
    import sympy
    from math_verify import verify

    g, a = expression(gold), expression(answer)
    if g is None or a is None or any(x.has(sympy.nan, sympy.zoo) for x in (g, a)):
        return False
    if (
        any(x.free_symbols == {sympy.Symbol("i")} for x in (g, a))
        or sympy.Symbol("i") in g.free_symbols & a.free_symbols
    ):  # the imaginary unit
        g, a = (x.subs(sympy.Symbol("i"), sympy.I) for x in (g, a))
    if all(isinstance(x, sympy.Expr) and x.is_number for x in (g, a)):
        return same_constant(g, a)
    return bool(verify(g, a, numeric_precision=DIGITS, timeout_seconds=None))


def same_constant(g, a):
    """Two constants: no digit of their difference is found among the first DIGITS. (Terms that both have cancel exactly.)"""
    if g.is_infinite or a.is_infinite:
        return bool(g == a)
    difference = (g - a).evalf(
        2, maxn=DIGITS
    )  # works with as many digits as two good ones of the result need, up to that
    return all(
        part == 0 or part.is_Float and part._prec == 1 for part in difference.as_real_imag()
    )  # a precision of 1: none is good


# -------------------------------------------------------------------------------------------------------- comparison


def equal(gold, answer):
    """Whether `answer` (what stands in the box) is the same as `gold`. See the conventions at the top."""
    try:
        gold, answer = tidy(gold), tidy(answer)
        if squeeze(gold) == squeeze(answer):
            return bool(answer)
        if any(c.isdigit() and not c.isascii() for c in answer):  # look-alikes of other scripts
            return False
        if not gold or not answer or set(RESTATING.findall(answer)) - set(RESTATING.findall(gold)):
            return False
        return any(
            same(read(gold, t), read(answer, u)) for t in (True, False) for u in (True, False)
        )
    except TooDeep:
        return False


def same(gold, answer):
    """Two shapes."""
    if answer.label and not gold.label and not names_only(answer.label, gold.text):
        return False
    if gold.label and answer.label and gold.label != answer.label:
        return same_function(gold, answer) or same_relation(gold, answer)
    if "relation" in (gold.kind, answer.kind):
        return same_relation(gold, answer)
    if r"\emptyset" in (gold.text, answer.text):
        return as_set(gold) == as_set(answer)
    if gold.kind in ("list", "set") or answer.kind in ("list", "set"):
        return same_items(gold, answer)
    if gold.kind != answer.kind or gold.kind == "union":
        sets = as_set(gold), as_set(answer)
        if None not in sets:
            return bool(sets[0] == sets[1])
    if gold.kind != answer.kind:
        return False
    if gold.kind == "value":
        return same_value(gold.text, answer.text)
    if gold.mark != answer.mark or len(gold.parts) != len(answer.parts):
        return False
    if gold.kind == "union":
        return set(gold.mark) == {r"\cup"} and match_all(gold.parts, answer.parts)
    return all(map(same, gold.parts, answer.parts))


def as_set(answer):
    """The sympy set of a range of numbers: an interval, a union or difference of such and of finite sets; else None."""
    import sympy

    if answer.kind == "tuple" and len(answer.parts) == 2:
        ends = [expression(part.text) if part.kind == "value" else None for part in answer.parts]
        if (
            any(end is None or not end.is_extended_real for end in ends)
            or (ends[0] < ends[1]) != True
        ):
            return None  # (2,1) is a point, and no empty interval
        return sympy.Interval(*ends, answer.mark[0] == "(", answer.mark[1] == ")")
    if answer.kind == "set":
        items = [expression(part.text) if part.kind == "value" else None for part in answer.parts]
        return None if None in items else sympy.FiniteSet(*items)
    if answer.kind == "value":
        return {r"\mathbb{R}": sympy.S.Reals, r"\emptyset": sympy.S.EmptySet}.get(
            squeeze(answer.text)
        )
    if answer.kind == "union":
        first, *others = map(as_set, answer.parts)
        for sign, other in zip(answer.mark, others):
            if first is None or other is None:
                return None
            first = first + other if sign == r"\cup" else first - other
        return first


def same_items(gold, answer):
    """Lists and sets: the same items in any order. A repeated item counts only where the gold repeats one."""
    if (
        gold.kind == "tuple"
        and answer.kind == "list"
        and len({item.label for item in answer.parts} - {""})
        == len(gold.parts)
        == len(answer.parts)
    ):
        return all(
            map(same, gold.parts, sorted(answer.parts, key=lambda item: item.label))
        )  # x=1, y=2 is (1,2)
    if any(x.kind in ("tuple", "union", "matrix") for x in (gold, answer)):
        return False
    g, a = (x.parts if x.kind in ("list", "set") else (x,) for x in (gold, answer))
    labels = [[item.label for item in items] for items in (g, a)]
    if (
        len(g) == len(a)
        and any(labels[0]) != any(labels[1])
        and len({re.sub(INDEX + "$", "", label) for label in labels[0] + labels[1] if label}) > 1
    ):
        return all(
            map(same, g, a)
        )  # a=1, b=2 without its labels: the order tells; x_1=1, x_2=2 are the solutions x
    if len(a) != len(g):
        a = [item for i, item in enumerate(a) if not any(same(item, other) for other in a[:i])]
    return match_all(g, a)


def match_all(gold, answer):
    """Whether the items pair off."""
    left = list(answer)
    for item in gold:
        found = next(
            (
                i
                for i, other in enumerate(left)
                if (item.kind == "set") == (other.kind == "set") and same(item, other)
            ),
            None,
        )
        if found is None:
            return False
        del left[found]
    return not left


def same_function(gold, answer):
    """f(x)=x and f(y)=y: the bound variable has no name."""
    heads = [re.fullmatch(r"(.+)\(([a-zA-Z])\)", x.label) for x in (gold, answer)]
    if not all(heads) or heads[0][1] != heads[1][1] or gold.kind != answer.kind:
        return False
    renamed = re.sub(rf"(?<![a-zA-Z\\]){heads[1][2]}(?![a-zA-Z])", heads[0][2], answer.text)
    return same(replace(gold, label=""), read(renamed, False))


FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~"}


def same_relation(gold, answer):
    """Equations and inequalities. One that the other side lacks is no answer, unless it only names a value or a range."""
    for one, other in ((gold, answer), (answer, gold)):
        if one.kind == "relation" and other.kind != "relation":
            if one.label and set(one.mark) == {"="} and not other.label:  # x = 2 + 3 = 5
                return (
                    all(same(part, other) for part in one.parts)
                    if one is answer
                    else all(same(other, part) for part in one.parts)
                )
            interval = as_interval(one)
            if interval and other.label in ("", variable(one)) and other.kind == "tuple":
                return other.mark == interval.mark and all(map(same, interval.parts, other.parts))
    if (
        gold.kind == answer.kind == "relation"
        and len(gold.parts) == len(answer.parts)
        and not gold.label
        and not answer.label
    ):
        for parts, signs in (
            (answer.parts, answer.mark),
            (answer.parts[::-1], tuple(FLIP.get(s, s) for s in answer.mark[::-1])),
        ):
            if signs == gold.mark and all(map(same, gold.parts, parts)):
                return True
    g, a = (f"{x.label} = {x.text}" if x.label else x.text for x in (gold, answer))
    if len(split(g, RELATIONS)[1]) != 1 or len(split(a, RELATIONS)[1]) != 1:
        return False
    return same_expression(g, a)


def variable(relation):
    """The name in an inequality that `as_interval` understood."""
    return next(part.text for part in relation.parts if LABEL.fullmatch(part.text))


def as_interval(relation):
    """a < x <= b, x > a: the interval of x, an Answer; None for other relations."""
    parts, signs = relation.parts, relation.mark
    if signs and signs[0] in (">", ">="):
        parts, signs = parts[::-1], tuple(FLIP.get(s, s) for s in signs[::-1])
    if not signs or not set(signs) <= {"<", "<="} or len(parts) not in (2, 3):
        return None
    named = [
        bool(LABEL.fullmatch(part.text)) and not re.fullmatch(r"\\(pi|infty)|e", part.text)
        for part in parts
    ]
    inf = Answer("value", r"\infty")
    if named == [True, False]:
        parts, signs = (replace(inf, text=r"-\infty"), *parts), ("<", *signs)
    elif named == [False, True]:
        parts, signs = (*parts, inf), (*signs, "<")
    elif named != [False, True, False]:
        return None
    low, _, high = parts
    mark = {"<": "(", "<=": "["}[signs[0]] + {"<": ")", "<=": "]"}[signs[1]]
    return Answer("tuple", relation.text, (low, high), mark)
