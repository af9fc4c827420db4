r"""Are two answers the same? `equal(gold, answer)`, the rules around math-verify.

math-verify judges single expressions and equations. What a policy could abuse is decided here, in
three steps:

1. `tidy` gives both texts one spelling (Unicode, fonts, spaces, fractions).
2. `read` finds the shape: value, list, set, tuple, union or relation. Shapes must agree. A list of
   candidates, or an interval around the answer, is therefore never the answer.
3. Values are compared exactly: numbers as fractions, words as words, units by name. Only
   expressions with variables, irrational constants and equations are left to sympy and math-verify.

Conventions: a label (x=, f(x)=), a unit or a currency may be left out; p\% is p or p/100; order
does not matter in a list or set; 1/2 \pi is 1/(2\pi); an unevaluated integral, sum, limit or
maximum equals only itself. A label or unit that is not in the tables (*.txt, shapes.py) is not
recognised, and makes the answer wrong.

Hostile text may keep `equal` busy for ever, so rewards.py calls it in a process that can be killed.
`canonical` takes little time for any text.
"""

import functools
import re
from dataclasses import replace
from fractions import Fraction

from answers.shapes import AXES, LABEL, Unreadable, read
from answers.spelling import parse_rows, parse_rules, respell, squeeze, table, tidy

# ------------------------------------------------------------------------------------------- values

UNITS = {}  # spelling -> name
for name, symbol in table("measures.txt"):
    for word, letter in [
        ("", ""),
        *parse_rows("nano n\nmicro µ\nmilli m\ncenti c\ndeci d\nkilo k\nmega M\ngiga G"),
    ]:
        spellings = (letter + symbol, word + name, word + name + "s")
        UNITS |= dict.fromkeys(spellings, word + name)

# Units, and what word problems count. A noun that is missing here is no unit: the answer must then
# be the bare number.
for name, *others in table("units.txt"):
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
\bper cent\b -> percent
\bper\b|/ -> ␣/␣
\bsq(?:uared?)?\b *(\w+) -> \1^2
\bcubic (\w+) -> \1^3
(\w+) ?\^ ?-1\b -> / \1
(\w+) ?\^ ?-([2-9])\b -> / \1^\2
\^ ?(\d) -> ␣^\1␣
""")
UNIT_TEXT = r"\\text *\{(?= */? *[\\a-zA-Zµ])(?:[^{}]|\{[^{}]*\})*\}"
TIGHT = r"(?<=[0-9])(?:[ckm]m|(?:kg|m[lL])(?! *\^))"  # 5cm; other letters may be variables
TWO = r"(?:(?<=[0-9] )|(?<=/)|(?<=/ ))(?!kT\b)[a-zA-Z]{2}"  # 2\pi hr is a product
SPEED = r"(?<=[0-9] )k?m ?/ ?[hs]"
PLAIN = rf"(?<=[ /])(?:[a-zA-Z]{{3,}}|[ck]m|(?<!pi )ft)|{TIGHT}|{TWO}|{SPEED}"
UNIT_WORD = rf"(?:{UNIT_TEXT}|(?:{PLAIN})(?![a-zA-Z])\.?)(?: *\^ *(?:-?[0-9]|\{{ ?-?[0-9] ?\}}))?"
UNIT = re.compile(  # a text with a digit or macro, then the unit; \mu mg is a product
    r"(?=.*(?:(?<![_^])[0-9]|\\pi(?![a-z])|\\text))"
    r"((?:[^0-9\\]|\\text)*(?:[0-9]|\\(?!text)).*?(?<=[\w})!])) *"
    rf"((?: *{UNIT_WORD}(?: */| *\\cdot)?)+|\^\\circ *(?:[CF]|\\text *\{{ *[CF] *\}})?)"
)
MONEY = re.compile(r"^([+-]?) *(\\text\{(?:dollar|euro|sterling|yen)\}) *(.+)")
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
SCIENTIFIC = r"10 ?\^ ?(?:\{ ?([+-]?[0-9]+) ?\}|([0-9]))$"
NUMBER_RULES = parse_rules(rf"""
\\frac ?\{{ ?(-?{DECIMAL}) ?\}} ?\{{ ?(-?{DECIMAL}) ?\}}(?! ?[0-9.]) -> ␣\1/\2
(?<![0-9])({DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?{SCIENTIFIC} -> \1×\2\3
^([+-]?) ?{SCIENTIFIC} -> \g<1>1×\2\3
^ *([+-]? ?(?:1|[0-9]*\.[0-9]*)) ?[eE]-([0-9]) *$ -> \1×-\2
""")
# Sign, integer of a mixed number, numerator, power of ten, denominator. 2e+1 and 2e-1 are no powers
# of ten; 1e-5 and 2.5e-5 are.
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
    if re.search(r"[\\+*^_=]", text):  # a formula: brackets, primes and case count
        return " ".join(text.split())
    text = " ".join(re.sub(r"""["'()]|(?<=[a-zA-Z])\.""", " ", text).split())
    if len(text) == 1 or re.fullmatch("(?!YES|ODD)[A-Z]{3}", text):
        return text
    return re.sub(r"\b(?:an?|the) (?=\w)", "", text.casefold())


# Shorter ones may be products.
WORDS = re.compile(r"\\text|(?<![\\a-zA-Z])(?<!_\{)[a-zA-Z]{4,}|^ *(?:[A-Z]{3}|(?i:yes|no|odd)) *$")


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
    r"|\.\.\.|\\frac\{ ?d[^{}]*\}\{ ?d ?\w ?\}|\\begin\{[vV]matrix\}|\\operatorname"
    r"|(?<!_\{)\b(?:max|min|det|lim|gcd|lcm)\b"
)
# Neighbours that the parser would multiply or add up, words, tricks, look-alikes, numbers in
# another base, a value put in.
NO_EXPRESSION = re.compile(
    r"(?<![_^])\d +\d|\\text|[?!]{2}|[0-9]['_]|[@#%&\"]|[+\-]{3}|[^ -~]|^\W*$"
    r"|\d *\\\{|\d\.\d*\.\d|\| *_|\| *\^ *\{[^{}]*=|[\d}] +_"
)
FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp)(?![a-zA-Z])"
INDICES = r"(?: ?[_^] ?(?:\w|\{ ?\w+ ?\}))*"
CALL = FUNCTION + INDICES
PAIR = r"\{[^{}]*\}\{[^{}]*\}"
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
OPERATOR = r"\\(?:cdot|times|div|frac|sqrt|binom|pm|mp|[lr]floor|[lr]ceil)(?![a-zA-Z])"
NAME = rf"(?!{FUNCTION}|{OPERATOR})(?:[a-zA-Z]|\\[a-zA-Z]+){INDICES}"
FACTOR = rf"\\frac ?{GROUP} ?{GROUP}|\\sqrt ?(?:\[[^\]]*\] ?)?{GROUP}|{NAME}(?: ?{NAME})*"
ARGUMENT = rf"(?:[0-9.]+ ?)?(?:{FACTOR})|[0-9.]+"
MIXED = r"(\d+) *(\\frac\{ ?\d+ ?\}\{ ?\d+ ?\})(?!\})"
PARSER_TRAPS = parse_rules(rf"""
# An integer before a number is added to it, as in a mixed number: 3(4) would be 7.
\\[dt]binom(?![a-zA-Z]) -> \\binom
(?<=\\cdot|times)(?=\d) -> ␣
(?<![\d.^_)}}\]])(?<!(?<!\\cdo)(?<!\\time)[a-zA-Z]){MIXED} -> {{\1+\2}}
(\\(?:binom|frac){PAIR}|\\pi|[)!\]]) *(?=[(\[]|\\binom) -> \1\\cdot␣
(?<![\w.^])(\d[\d.]*) *(?=[({{\[]|\\binom) -> \1\\cdot␣
(\\binom{PAIR}|\)) *(?=\d|\\frac|\{{) -> \1\\cdot␣
(?<!\\)(\[[\d.]+\]) *(?=\d) -> \1\\cdot␣
(\\frac{PAIR}) *(?=\\frac|\d|\{{) -> \1\\cdot␣
(?<![\w}}\]])(\{{\d+\}}) *(?=[({{\[\d]|\\frac|\\binom) -> \1\\cdot␣
# What would be 0, 1 or nothing: dy/dx, \gcd(m,n), ^T.
\\frac\{{ ?(?:d|\\partial) ?(\w) ?\}}\{{ ?(?:d|\\partial) ?(\w) ?\}} -> D_{{\1\2}}
\\gcd(?![a-zA-Z]) -> G_{{cd}}
\\operatorname *\{{ *(gcd|lcm) *\}} -> G_{{\1}}
(?<=\^)(?:T(?![a-zA-Z_])|\{{ ?T ?\}}) -> {{N_{{T}}}}
# A function takes all that follows, of \log_{{10}} 25 the 2 alone. (Before /( and /\sin it is a
# quotient, and \sin x/y stays.)
(\\log ?_ ?(?:\d|\{{[^{{}}]*\}})) *(\d[\d.]*)(?![\d.!]| ?[a-zA-Z\\({{^]) -> \1(\2)
({CALL}) *\{{((?:[^{{}}]|{GROUP})*)\}} -> \1(\2)
({CALL}) *(\|[^|]*\|) -> \1(\2)
({CALL}) *\[([^\[\]]*)\] -> \1(\2)
({CALL}) *({ARGUMENT})(?= *(?:\\(?:cdot|times)(?![a-zA-Z])|\*)) -> \1(\2)
({CALL}) *({ARGUMENT})(?= */ *(?:{FUNCTION}|[(\[])) -> \1(\2)
# Names: \gamma is a function, I is i, an index of E, e and I is lost, as are primes; 2E+1 is 20.
(?<![a-zA-Z_\\])E_(\w) -> Q_{{EE\1}}
(?<![a-zA-Z_\\])E_\{{ -> Q_{{EE
(?<![a-zA-Z_\\])e_(\w) -> q_{{ee\1}}
(?<![a-zA-Z_\\])e_\{{ -> q_{{ee
\^ ?(\\[gG]amma|I)(?![a-zA-Z_]) -> ^{{\1}}
\\gamma_(\w) -> q_{{amma\1}}
\\gamma_\{{ -> q_{{amma
\\gamma(?![a-zA-Z]) -> q_{{amma}}
\\Gamma *\( -> \\Gamma(
\\Gamma(?![a-zA-Z_(]) -> G_{{amma}}
(?<![\\_])(?<!_\{{)I_(\w) -> N_{{J\1}}
(?<![\\_])(?<!_\{{)I_\{{ -> N_{{J
(?<![\\_])(?<!_\{{)I -> N_{{J}}
(?<=\d)E(?=[+-]\d) -> ␣E␣
(?<=[\w}})])'' -> _{{pp}}
(?<=[\w}})])' -> _{{p}}
""")
CALCULUS = re.compile(
    r"\\i*int(?![a-zA-Z])|\\partial|\\frac *\{ *d(?:[^{}]|\{[^{}]*\})*\} *\{ *d"
    r"|(?<![a-zA-Z\\])d ?(?:\^ ?\w ?)?\\?[a-zA-Z]+(?:_\w)? */ *\(? ?d ?\\?[a-zA-Z]"
)
D = re.compile(r"(\\[a-zA-Z]+|_\{[^{}]*\})|d(?= *[a-zA-Z\\])")  # dx is one name to the parser


@functools.lru_cache(maxsize=4096)
def expression(text):
    """sympy's reading of a LaTeX text, decimals as fractions. None if it is not all mathematics."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if NO_EXPRESSION.search(text):
        return None
    if not CALCULUS.search(text):
        text = D.sub(lambda match: match[1] or "{d}", text)
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
    if not parsed.has(sympy.Sum, sympy.Product, sympy.Integral):  # there it is an index
        exact[sympy.Symbol("i")] = sympy.I
    parsed = parsed.xreplace(exact)
    if isinstance(parsed, sympy.Expr):
        parsed = evaluated(parsed)
    return None if parsed.has(sympy.nan, sympy.zoo, sympy.Derivative) else parsed


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
    # 1 000 000 has no other reading; 1 234/5 is a mixed number
    text = re.sub(
        r"(?<![\w.,^}])(?<![\w.] )\d{1,3}(?: \d{3})+(?![\d/]| [\d/])",
        lambda m: m[0].replace(" ", ""),
        text,
    )
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
        labels = [part.label for part in labelled.parts]
        if other.kind != "list" or labelled.label or not all(labels):
            return False
    elif gold.mark != answer.mark:
        return False
    elif all(part.label for part in gold.parts + answer.parts):
        gold, answer = (
            replace(shape, parts=tuple(sorted(shape.parts, key=lambda part: part.label)))
            for shape in (gold, answer)
        )
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
    """Two equations or inequalities with one sign each, by algebra. One that is to be solved for
    the label is not the solution."""
    if gold.label not in ("", answer.label, *[part.text for part in answer.parts]):
        value = expression(gold.text)
        names = {symbol.name for symbol in value.free_symbols} if value is not None else set()
        if gold.label not in AXES or not names & AXES:  # only a line or curve may be so
            return False
    texts = []
    for shape in (gold, answer):
        if len(shape.mark) > 1 or not (shape.label or shape.kind == "relation"):
            return False
        if r"\approx" in shape.mark:  # the parser drops its right side
            return False
        texts.append(f"{shape.label} = {shape.text}" if shape.label else shape.text)
    return same_expression(*texts)


# ------------------------------------------------------------------------------------- gold answers

# Of a value in words. Longer ones are prose: a right answer would be worded otherwise.
MOST_WORDS = 6
PLACEHOLDERS = "proof", "notfound", "nan", "null"  # of NuminaMath, of tables


def gradable(gold):
    """Whether another answer can be found equal to this gold answer: it is no worked solution, its
    brackets pair, it is no placeholder, and none of its values is prose. It takes little time for
    any text."""
    if "####" in gold or r"\boxed" in gold or gold.strip().casefold() in PLACEHOLDERS:
        return False
    try:
        text = tidy(gold)
        words = [len(WORDS.findall(value)) for value in values(read(text))]
        return text != "" and max(words) <= MOST_WORDS
    except ValueError:  # unreadable, or an integer of more digits than Python writes
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
    except ValueError:  # as above
        return squeeze(text)


def spell(shape):
    if shape.kind in ("list", "set"):
        return ",".join(sorted(map(spell, shape.parts)))
    if shape.kind == "union" and len(shape.parts) == 1:
        return spell(shape.parts[0])
    labels = {part.label for part in shape.parts}
    if shape.kind == "tuple" and "" not in labels and not labels <= AXES:
        return "()" + ",".join(sorted(f"{part.label}={spell(part)}" for part in shape.parts))
    if shape.kind == "tuple":
        return f"{shape.mark}{','.join(map(spell, shape.parts))}"
    core, unit = quantity(shape.text)
    value = number(core)
    if value is not None:
        core = str(value)
    elif WORDS.search(core):
        core = plain_words(core)
    return f"{squeeze(core)} {unit}".strip()


# ------------------------------------------------------------------------------------------- boxes


def extract_answer(text):
    r"""The content of the last \boxed{...}, or None.

    Only what follows the last </think> counts; a <think> that never closes means no answer. If the
    last box is unclosed or blank there is no answer, whatever stood in earlier ones.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    *before, last = re.split(r"\\boxed\s*\{", text)
    if not before:
        return None
    if len(before) > 1 and re.match(r"[^{}\n]*\}%[ \t]*$", before[-1]):
        return None  # the last box is a comment to LaTeX: neither this one nor the one before pays
    depth = 1
    for match in re.finditer(r"\\.|[{}]", last, re.DOTALL):  # an escaped \{ is no brace
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            answer = last[: match.start()].strip(" \t\r\n")
            return answer if answer.strip(". ") else None
    return None
