r"""Are two answers the same? `equal(gold, answer)`, the rules around math-verify.

math-verify judges single expressions and equations. What a policy could abuse is decided here, in
three steps:

1. `tidy` gives both texts one spelling (Unicode, fonts, spaces, fractions).
2. `read` finds the shape: value, list, set, tuple, union or relation. Shapes must agree. A list of
   candidates, or an interval around the answer, is therefore never the answer.
3. Values are compared exactly: numbers as fractions, words as words, units by name. Only
   expressions with variables, irrational constants and equations are left to sympy and math-verify.

Conventions: a label (x=, f(x)=), a unit or a currency may be left out; p\% is p or p/100; order
does not matter in a list or set; an unevaluated integral, sum, limit or maximum equals only itself.
A label or unit that is not in the tables below is not recognised, and makes the answer wrong.

Hostile text may keep `equal` busy for ever, so rewards.py calls it in a process that can be killed.
`canonical` takes little time for any text.
"""

import functools
import re
from dataclasses import dataclass, replace
from fractions import Fraction

# ----------------------------------------------------------------------------------------- spelling


def parse_rows(table):
    """The rows of a table: lists of words."""
    return [row.split() for row in table.strip().split("\n")]


def parse_rules(table):
    """[(compiled pattern, new text), ...] of the lines `pattern -> new text`; ␣ is a blank."""
    rows = [row.partition(" ->") for row in table.strip().split("\n")]
    return [(re.compile(pattern), new.strip().replace("␣", " ")) for pattern, _, new in rows]


def respell(rules, text):
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎"
CHARACTERS = str.maketrans(RAISED + LOWERED, "0123456789+-()n0123456789+-()")
for spelling, *characters in parse_rows(r"""
- − – ﹣
+ ＋
/ ÷ ∕ ⁄
= ＝
, ，
: ： ∶
' ′ ’
" “ ”
\times ×
\cdot ⋅ · ∙
\pm ±
\mp ∓
\le ≤ ⩽
\ge ≥ ⩾
\ne ≠
\approx ≈
\in ∈
\cup ∪
\cap ∩
\setminus ∖
\emptyset ∅
\infty ∞
\sum ∑
\prod ∏
\int ∫
\lor ∨
\land ∧
^\circ ° º
\mathbb{R} ℝ
\mathbb{Z} ℤ
\mathbb{N} ℕ
\mathbb{Q} ℚ
\mathbb{C} ℂ
\langle ⟨
\rangle ⟩
\lfloor ⌊
\rfloor ⌋
\lceil ⌈
\rceil ⌉
\ldots …
\% ％
\text{dollar} ＄
\text{euro} €
\text{sterling} £
\text{yen} ¥
\alpha α
\beta β
\gamma γ
\delta δ
\epsilon ε
\theta θ
\lambda λ
\mu μ
\pi π
\sigma σ
\phi φ
\omega ω
\frac{1}{2} ½
\frac{1}{3} ⅓
\frac{2}{3} ⅔
\frac{1}{4} ¼
\frac{3}{4} ¾
\frac{1}{5} ⅕
\frac{2}{5} ⅖
\frac{3}{5} ⅗
\frac{4}{5} ⅘
\frac{1}{6} ⅙
\frac{5}{6} ⅚
\frac{1}{7} ⅐
\frac{1}{8} ⅛
\frac{3}{8} ⅜
\frac{5}{8} ⅝
\frac{7}{8} ⅞
\frac{1}{9} ⅑
"""):
    if spelling[-1].isalpha():
        spelling += " "  # the next letter does not belong to the macro
    CHARACTERS |= str.maketrans(dict.fromkeys(characters, spelling))

MACROS = {}  # name of a macro -> spelling
for spelling, *names in parse_rows(r"""
\frac dfrac tfrac cfrac
\le leq leqq leqslant
\ge geq geqq geqslant
\ne neq
< lt
> gt
\or lor vee
\{ lbrace
\} rbrace
[ lbrack
] rbrack
\setminus backslash
^\circ degree degrees
; quad qquad newline
\text textnormal textbf textit textrm mathrm textsf texttt mbox hbox emph
~ left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle
~ limits nolimits thinspace medspace mathbf mathit mathsf boldsymbol bm pmb mathnormal bf it rm
"""):
    MACROS |= dict.fromkeys(names, f" {spelling} ")
BEFORE_MACROS = parse_rules(r"""
\\\\(?:\[[^\]]*\])? -> ␣;␣
\\\$ -> \\text{dollar}
\\[()\[\]]|\$ -> ␣
\\not *= -> \\ne␣
\\not *\\in(?![a-zA-Z]) -> \\notin␣
<= -> \\le␣
>= -> \\ge␣
\\(?:left|right) ?\. ->
(?<=\d)(?:\{,\}|,?\\[,!]) ?(?=\d{3}(?!\d)) ->
\\[,:;>! ]|~ -> ␣
\\(?:mathbf|mathit|mathsf|boldsymbol|bm) *\{ *([a-zA-Z]) *\} -> ␣\1␣
\\(?:mathrm|textrm) *\{ *([deixyz]) *\} -> ␣\1␣
""")
AFTER_MACROS = parse_rules(r"""
~ -> ␣
\\text +(?=\{) -> \\text
\\text *\{ *,? *(and|or) *,? *\} -> ␣\\\1␣
(?<=[ \d}),])(and|or)(?=[ \d\\(])(?![^{}\\]*\}) -> ␣\\\1␣
\\?% -> \\text{ percent }
\^ *\{ *\\circ *\} -> ^\\circ
\\(sin|cos|tan|cot|sec|csc) *\(? ?([0-9.]+) ?\^ ?\\circ ?\)? -> \\\1(\\frac{\2\\pi}{180})
\^ *(?:\\prime|\{ *\\prime *\}) -> '
\{([^{}]*)\\choose([^{}]*)\} -> \\binom{\1}{\2}
\\(sqrt|frac) +(?=[\d{]) -> \\\1
\\frac(\d)(\d) -> \\frac{\1}{\2}
\\frac(\d)\{ -> \\frac{\1}{
\\frac(\{[^{}]*\})(\d) -> \\frac\1{\2}
\\sqrt(\d) -> \\sqrt{\1}
\\frac\{ ?\\text\{([^{}]*)\} ?\}\{ ?\\text\{([^{}]*)\} ?\} -> \\text{\1/\2}
([_^])\{ ?(\w) ?\}(?!\w) -> \1\2
\((\w+)\) ?_ -> \1_
\\(?:emptyset|varnothing)(?![a-zA-Z]) -> \\{\\}
\\mathbb *(?:R|\{ ?R ?\}) -> (-\\infty,\\infty)
""")
ENDS = parse_rules(r"""
[ ]+ -> ␣
^[ ]?=?[ ]? ->
(?<![,;: ])(?:[,;: ]*(?<!\.)\.)?[,;: ]*$ ->
""")
ROOTS = parse_rules(rf"""
√ *([0-9.]+|[a-zA-Z]) -> \\sqrt{{\1}}
√ *\(([^()]*)\) -> \\sqrt{{\1}}
√ -> \\sqrt
[\u200b-\u200d\u2060\ufeff\u00ad] ->
[\u00a0\u2000-\u200a\u202f\u3000\n\r\t] -> ␣
([{RAISED}]+) -> ^{{\1}}
([{LOWERED}]+) -> _{{\1}}
""")


def tidy(text):
    """One spelling for what means the same.

    Control characters stay, and make the text equal to nothing.
    """
    text = respell(ROOTS, text).translate(CHARACTERS)
    text = respell(BEFORE_MACROS, text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda macro: MACROS.get(macro[1], macro[0]), text)
    text = respell(AFTER_MACROS, text)
    text = re.sub(
        r"(?<![\d.])(?<!\d )([0-9]*)\.([0-9]*)\\(?:overline|dot) ?\{? ?([0-9]+) ?\}?(?!\d|\\dot)",
        repeating_decimal,
        text,
    )
    return respell(ENDS, text)


def repeating_decimal(match):
    r"""0.1\overline{6} as \frac{15}{90}."""
    whole, start, cycle = match.groups()
    top = int(whole + start + cycle) - int("0" + whole + start)
    return rf"\frac{{{top}}}{{{'9' * len(cycle)}{'0' * len(start)}}}"


def squeeze(text):
    """The text without the blanks that separate no words."""
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


# ------------------------------------------------------------------------------------------- shapes


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
    rf"{SYMBOL}(?:'* *\( *(?:{SYMBOLS}|[0-9]+) *\))?|\( *{SYMBOLS} *\)|{SYMBOL}(?: *: *{SYMBOL})+"
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
        items.sort(key=lambda item: item.label)  # x=1, y=2: the labels tell the order
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
        return replace(read(value), label=squeeze(label))
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


# ------------------------------------------------------------------------------------------- values

UNITS = {}  # spelling -> name
for name, symbol in parse_rows("""
meter m
gram g
second s
liter L
liter l
newton N
pascal Pa
joule J
watt W
volt V
ampere A
hertz Hz
electronvolt eV
mole mol
kelvin K
tesla T
calorie cal
byte B
"""):
    for word, letter in [
        ("", ""),
        *parse_rows("nano n\nmicro µ\nmilli m\ncenti c\nkilo k\nmega M\ngiga G"),
    ]:
        spellings = (letter + symbol, word + name, word + name + "s")
        UNITS |= dict.fromkeys(spellings, word + name)

# Units, and what word problems count. A noun that is missing here is no unit: the answer must then
# be the bare number.
OTHER_UNITS = parse_rows("""
inch in
foot ft feet
yard yd
mile mi
minute min
hour h hr
day
week
month
year yr
pound lb
ounce oz
gallon gal
ton tonne
degree deg
radian rad
celsius C
fahrenheit F
dollar USD usd buck
cent penny pennies
euro EUR eur
sterling GBP
yen
percent
acre
hectare
atmosphere atm
ohm
kilo
unit
/
^2
^3
person people
child children
man men
woman women
mouse mice
goose geese
tooth teeth
city cities
baby babies
party parties
berry berries
strawberry strawberries
blueberry blueberries
cherry cherries
candy candies
country countries
family families
story stories
leaf leaves
loaf loaves
""")
COUNTED = """
animal ant apple apricot bag ball balloon banana bar barrel basket bead bean bear bed bee bike
bill bird block board boat book bottle bowl box boy bracelet branch bread brick broccoli brownie
bucket bun bus bush button cake calf can candle car card carrot case cat chair chicken chip
chocolate choice circle class classroom clown coat coin color colour combination container cookie
corner cow crate crayon customer cracker crab cup cupcake cycle desk dish diagonal digit divisor
dog doll donkey donut door dress drawer drink duck edge egg element elephant employee engine
envelope episode error eraser exam face factor feather fiddle file floor flower forest fork friend
frog fruit function game garden gift girl glass glove goal goat grape group guest gumball hat hen
home horse hotdog house hurdle insect integer item jar jersey job joke jump kangaroo key kid
kitten knife lady lamp lap lemon letter level light line lion list lot machine magazine mango
marble mark marker match meal member message metre minivan mirror monkey movie muffin nail
necklace nickel night note notebook number nut olive orange order outcome outfit owl pack package
packet page painting pan pancake paper parent part party passenger patient peach pear pearl pea
pebble peg pen pencil pepper permutation pet phone photo picture pie piece pig pill pillow pine
pineapple pint pirate pizza plane plant plate player plum point pole pool potato present prize
problem puppy puzzle quart question rabbit raffle rat rectangle ribbon ride ring road rock roll
room rose round row ruler sandwich scarf school scoop seashell seat seed set shark sheet shell
shelf ship shirt shoe shop shot side sign sister skirt slice snack snake sock soda solution song
spider spoon spot stamp star step sticker stick stone store straw street student subset sunflower
suit sweater sweet table tablespoon task taxi teacher team teaspoon term test text ticket tile
time tire toddler tomato tool tourist toy train tree triangle trip truck tulip turkey turn turtle
tv value van vase vegetable vehicle video visitor volunteer vote voter walnut watch watermelon way
wheel window word worker yard zebra
"""
for name, *others in [*OTHER_UNITS, *zip(COUNTED.split())]:
    for spelling in (name, *others):
        UNITS |= dict.fromkeys((spelling, spelling + "s", spelling + "es"), name)
UNIT_RULES = parse_rules(r"""
\\text|[{}.] -> ␣
\b(?:different|distinct|possible|whole)\b -> ␣
\b(?:red|blue|green|yellow|black|white|small|large|new|old)\b -> ␣
\\cdot(?![a-zA-Z]) -> ␣
\^\\circ -> ␣degree␣
(?<=met|lit)re(?=s?\b) -> er
\bmph\b -> mile per hour
\bkm?ph\b -> kilometer per hour
\bper\b|/ -> ␣/␣
\bsq(?:uared?)?\b *(\w+) -> \1^2
\bcubic (\w+) -> \1^3
(\w+) ?\^ ?-1\b -> / \1
(\w+) ?\^ ?-([2-9])\b -> / \1^\2
\^ ?(\d) -> ␣^\1␣
""")
UNIT_TEXT = r"\\text *\{(?= */? *[\\a-zA-Zµ])(?:[^{}]|\{[^{}]*\})*\}"
UNIT_WORD = rf"(?:{UNIT_TEXT}|(?<=[ /])[a-zA-Z]{{2,}}\.?)(?: *\^ *\{{?-?[0-9]\}}?)?"
UNIT = re.compile(  # a text with a digit or macro, then the unit
    r"((?:[^0-9\\]|\\text)*(?:[0-9]|\\(?!text)).*?(?<=[\w})!])) *"
    rf"((?: *{UNIT_WORD}(?: */| *\\cdot)?)+|\^\\circ *(?:[CF]|\\text *\{{ *[CF] *\}})?)"
)
MONEY = re.compile(r"^([+-]?) *(\\text\{(?:dollar|euro|sterling|yen)\}) *(.+)")
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
SCIENTIFIC = r"10 ?\^ ?(?:\{ ?([+-]?[0-9]+) ?\}|([0-9]))$"
NUMBER_RULES = parse_rules(rf"""
\\frac ?\{{ ?(-?{DECIMAL}) ?\}} ?\{{ ?(-?{DECIMAL}) ?\}} -> ␣\1/\2
(?<![0-9])({DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?{SCIENTIFIC} -> \1×\2\3
^([+-]?) ?{SCIENTIFIC} -> \g<1>1×\2\3
""")
# Sign, integer of a mixed number, numerator, power of ten, denominator. 2e+1 is no power of ten.
NUMBER = re.compile(
    rf" *([+-]?) *(?:([0-9]+) +(?=[0-9.]+/ ?[0-9.]+ *$))?(-?{DECIMAL})"
    rf"(?:(?:×|[eE](?=[0-9]|[+-][0-9]{{2}}))([+-]?[0-3]?[0-9]{{1,3}}))?(?: ?/ ?(-?{DECIMAL}))? *"
)


def quantity(text):
    """(the text without its unit, the unit's name or "")."""
    found = UNIT.fullmatch(MONEY.sub(r"\1\3\2", text))
    name = found and unit_name(found[2])
    return (found[1], name) if name else (text, "")


def unit_name(text):
    """One name for km/h and for kilometers per hour. It is "" if a word is not known."""
    words = respell(UNIT_RULES, text).split()
    names = [UNITS.get(word) or UNITS.get(word.lower(), "") for word in words]
    return " ".join(names) if all(names) else ""


def number(text):
    """An exact Fraction if the text is a decimal, fraction, mixed number or a x 10^b, else None."""
    match = NUMBER.fullmatch(respell(NUMBER_RULES, text))
    if not match:
        return None
    sign, integer, numerator, power, denominator = match.groups()
    denominator = Fraction(denominator or 1)
    if denominator == 0:
        return None
    value = Fraction(numerator) * Fraction(10) ** int(power or 0) / denominator + int(integer or 0)
    return -value if sign == "-" else value


def plain_words(text):
    """The text as words, without text macros, punctuation, articles and the case of words."""
    text = re.sub(r"\\text *\{([^{}]*)\}", r" \1 ", text)
    text = " ".join(re.sub(r"""["'()]|(?<=[a-zA-Z])\.""", " ", text).split())
    return text if len(text) == 1 else re.sub(r"\b(?:an?|the) (?=\w)", "", text.casefold())


WORDS = re.compile(r"\\text|(?<![\\a-zA-Z])[a-zA-Z]{4,}")


def same_value(gold, answer):
    """Two plain values, by exact arithmetic where there is no variable."""
    (g, g_unit), (a, a_unit) = quantity(gold), quantity(answer)
    if g_unit and a_unit and g_unit != a_unit:
        return False
    if g_unit != a_unit and "percent" in (g_unit, a_unit):  # p% is p or p/100
        share, other = map(number, (g, a) if g_unit else (a, g))
        if share is not None and other == share / 100:
            return True
    if squeeze(g) == squeeze(a):
        return True
    x, y = number(g), number(a)
    if x is not None and y is not None:
        return x == y
    if WORDS.search(g) or WORDS.search(a):
        return plain_words(g) == plain_words(a)
    return same_expression(g, a)


# -------------------------------------------------------------------------------------- expressions

DIGITS = 2500  # to which irrational numbers are compared: more than an answer can hold
RESTATING = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim(?:sup|inf)?|partial|det|max|min|sup|inf|gcd|ldots|cdots|dots"
    r"|underset|overset|[bp]?mod|[hv]?phantom)(?![a-zA-Z])"
    r"|\.\.\.|\\frac\{d\}\{d\w\}|\\begin\{[vV]matrix\}|\\operatorname"
    r"|\b(?:max|min|det|lim|gcd|lcm)\b"
)
# Neighbours that the parser would multiply or add up, words, tricks, look-alikes, numbers in
# another base.
NO_EXPRESSION = re.compile(
    r"(?<![_^])\d +\d|\\text|[?!]{2}|[0-9]['_]|[@#%&\"]|[+\-]{3}|[^ -~]|^\W*$"
)
# The parser takes \Gamma for \gamma, I for i and 2E+1 for 20, and drops primes.
PARSER_TRAPS = parse_rules(r"""
\\Gamma(?![a-zA-Z_]) -> G_{amma}
(?<![a-zA-Z_\\])(?<!_\{)I(?![a-zA-Z_]) -> N_{I}
(?<=\d)E(?=[+-]\d) -> ␣E␣
(?<=[\w})])'' -> _{pp}
(?<=[\w})])' -> _{p}
""")


@functools.lru_cache(maxsize=4096)
def expression(text):
    """sympy's reading of a LaTeX text, decimals as fractions. None if it is not all mathematics."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if NO_EXPRESSION.search(text):
        return None
    try:
        parsed = latex2sympy(
            respell(PARSER_TRAPS, text),
            conversion_config=ConversionConfig(lowercase_symbols=False),
            normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"),
        )
    except Exception:  # the parser's many ways to say that this is no mathematics
        return None
    exact = {number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)}
    for symbol in parsed.free_symbols:
        if symbol.name != symbol.name.lower():
            exact[symbol] = sympy.Symbol(symbol.name + "_")  # math-verify ignores case
    exact[sympy.Symbol("i")] = sympy.I
    parsed = parsed.xreplace(exact)
    if isinstance(parsed, sympy.Expr):
        parsed = evaluated(parsed)
    return None if parsed.has(sympy.nan, sympy.zoo) else parsed


def evaluated(expression):
    """The parser leaves 1/3/3 as written, and evalf takes time exponential in such a depth."""
    return expression.func(*map(evaluated, expression.args)) if expression.args else expression


def same_expression(gold, answer):
    """Exactly equal for every value of the variables, which must be the same ones."""
    import sympy
    from math_verify import verify

    g, a = expression(gold), expression(answer)
    if g is None or a is None:
        return False
    if all(isinstance(x, sympy.Expr) and x.is_number for x in (g, a)):
        return same_constant(g, a)
    return bool(verify(g, a, numeric_precision=DIGITS, timeout_seconds=None))


def same_constant(g, a):
    """Whether the difference of two constants is 0 in its first DIGITS digits.

    Terms that both have cancel exactly.
    """
    if g == a:
        return True
    difference = (g - a).evalf(2, maxn=DIGITS)  # uses more digits, up to DIGITS, until two are sure
    parts = difference.as_real_imag()
    return all(part == 0 or part.is_Float and part._prec == 1 for part in parts)  # 1: none is sure


# --------------------------------------------------------------------------------------- comparison


def equal(gold, answer):
    """Whether `answer` (what stands in the box) is the same as `gold`; conventions: at the top."""
    gold, answer = tidy(gold), tidy(answer)
    if squeeze(gold) == squeeze(answer):
        return bool(answer)
    if set(RESTATING.findall(answer)) - set(RESTATING.findall(gold)):
        return False
    try:
        return any(same(g, a) for g in readings(gold) for a in readings(answer))
    except Unreadable:
        return False


def readings(text):
    """1,234 is a number or a list."""
    return {read(text), read(join_thousands(text))}


def join_thousands(text):
    pattern = r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])"
    return re.sub(pattern, lambda match: match[0].replace(",", ""), text)


def same(gold, answer):
    """Two shapes."""
    if gold.label and answer.label and gold.label != answer.label:
        return same_function(gold, answer) or same_equation(gold, answer)
    kinds = {gold.kind, answer.kind}
    if "relation" in kinds:
        return same_relation(gold, answer)
    if "union" in kinds:
        return "list" not in kinds and same_union(gold, answer)
    if kinds == {"value"}:
        return same_value(gold.text, answer.text)
    if kinds <= {"value", "list", "set"}:
        return same_items(items_of(gold), items_of(answer))
    return same_tuple(gold, answer)


def items_of(shape):
    return shape.parts if shape.kind in ("list", "set", "union") else (shape,)


def same_items(gold, answer):
    """The same items in any order. A repeated item counts only where the gold repeats one."""
    if len(answer) != len(gold):
        distinct = []
        for item in answer:
            if not any(same(item, other) for other in distinct):
                distinct.append(item)
        answer = distinct
    rest = list(answer)
    for item in gold:
        for other in rest:
            if (item.kind == "set") == (other.kind == "set") and same(item, other):
                rest.remove(other)
                break
        else:
            return False
    return not rest


def same_tuple(gold, answer):
    """Tuples, intervals, matrices and ratios.

    The labels of x=1, y=2 tell an order: it is the list 1, 2, whose order then counts.
    """
    if gold.kind != answer.kind:
        labelled, other = (gold, answer) if gold.kind == "tuple" else (answer, gold)
        if other.kind != "list" or not all(part.label for part in labelled.parts):
            return False
    elif gold.mark != answer.mark:
        return False
    if len(gold.parts) != len(answer.parts):
        return False
    return all(map(same, gold.parts, answer.parts)) or gold.mark == ":" and same_ratio(gold, answer)


def same_ratio(gold, answer):
    """4:6 is 2:3. Multiples of the gold only: 2:5 is not the time 12:30."""
    g, a = ([number(part.text) for part in shape.parts] for shape in (gold, answer))
    if None in g + a or not a[0] >= g[0] > 0:
        return False
    return [x * a[0] for x in g] == [x * g[0] for x in a]


def same_union(gold, answer):
    """Sets of real numbers, by sympy if all numbers are known, else part by part."""
    g, a = as_set(gold), as_set(answer)
    if g is not None and a is not None:
        return bool(g == a)
    known = r"\setminus" not in (*gold.mark, *answer.mark)
    return known and same_items(items_of(gold), items_of(answer))


def as_set(shape):
    """The sympy set of an interval, a finite set, or a union or difference of such; else None."""
    import sympy

    if shape.kind == "union":
        result, *others = map(as_set, shape.parts)
        for sign, other in zip(shape.mark, others):
            if result is None or other is None:
                return None
            result = result - other if sign == r"\setminus" else result + other
        return result
    values = [expression(part.text) for part in shape.parts]
    if not all(isinstance(value, sympy.Expr) and value.is_extended_real for value in values):
        return None
    if shape.kind == "set":
        return sympy.FiniteSet(*values)
    is_interval = shape.mark in ("()", "(]", "[)", "[]") and len(values) == 2
    if is_interval and values[0] < values[1]:  # (2,1) is a point
        return sympy.Interval(*values, shape.mark[0] == "(", shape.mark[1] == ")")
    return None


def same_function(gold, answer):
    """f(x)=x and f(y)=y: the bound variable has no name."""
    g, a = (re.fullmatch(r"(.+)\(([a-zA-Z])\)", shape.label) for shape in (gold, answer))
    if not g or not a or g[1] != a[1]:
        return False
    renamed = re.sub(rf"(?<![a-zA-Z\\]){a[2]}(?![a-zA-Z])", g[2], answer.text)
    return same(replace(gold, label=""), read(renamed))


def same_relation(gold, answer):
    """Equations and inequalities.

    If only the answer is one, all its sides must equal the gold: x = 2 + 3 = 5 is 5.
    """
    same_signs = gold.kind == answer.kind and gold.mark == answer.mark
    if same_signs and all(map(same, gold.parts, answer.parts)):
        return True
    if gold.kind != "relation" and not gold.label:
        sides = answer.parts
        if len(sides) > 2 and LABEL.fullmatch(sides[0].text):
            sides = sides[1:]
        return set(answer.mark) == {"="} and all(same(gold, side) for side in sides)
    return same_equation(gold, answer)


def same_equation(gold, answer):
    """Two equations or inequalities with one sign each, by algebra."""
    texts = []
    for shape in (gold, answer):
        if len(shape.mark) > 1 or not (shape.label or shape.kind == "relation"):
            return False
        texts.append(f"{shape.label} = {shape.text}" if shape.label else shape.text)
    return same_expression(*texts)


# ------------------------------------------------------------------------------------- gold answers

# Of a value in words. Longer ones are prose: a right answer would be worded otherwise.
MOST_WORDS = 6


def gradable(gold):
    """Whether another answer can be found equal to this gold answer: it is no worked solution, its
    brackets pair, and none of its values is prose. It takes little time for any text."""
    if "####" in gold or r"\boxed" in gold or not tidy(gold):
        return False
    try:
        return all(len(WORDS.findall(value)) <= MOST_WORDS for value in values(read(tidy(gold))))
    except Unreadable:
        return False


def values(shape):
    """The texts of all values within a shape."""
    if not shape.parts:
        return [shape.text]
    return [text for part in shape.parts for text in values(part)]


# -------------------------------------------------------------------------------------------- votes


def canonical(answer):
    r"""A spelling under which equal answers usually meet, for counting votes (not for grading).

    It is one for 0.5, 1/2 and \dfrac12; for 1,2 and \{2,1\}; for x=5 and 5; for B and \text{B}.
    Units count. It takes little time for any text, unlike the algebra of `equal`.
    """
    text = tidy(answer[:1000])[:1000]
    try:
        return spell(read(join_thousands(text)))
    except Unreadable:
        return squeeze(text)


def spell(shape):
    if shape.kind in ("list", "set"):
        return ",".join(sorted(map(spell, shape.parts)))
    if shape.kind == "tuple":
        return f"{shape.mark}{','.join(map(spell, shape.parts))}"
    core, unit = quantity(shape.text)
    value = number(core)
    if value is not None:
        core = str(value)
    elif WORDS.search(core):
        core = plain_words(core)
    return f"{squeeze(core)} {unit}".strip()
