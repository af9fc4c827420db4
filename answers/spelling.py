"""One spelling for what means the same: Unicode, fonts, spaces, fractions."""

import re
from pathlib import Path


def parse_rows(table):
    """The rows of a table: lists of words."""
    return [row.split() for row in table.strip().split("\n")]


def table(name):
    """The rows of a file of this folder."""
    return parse_rows(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def parse_rules(table):
    """[(compiled pattern, new text), ...] of the lines `pattern -> new text`; ␣ is a blank, and a
    line that begins with # is none."""
    lines = [line for line in table.strip().split("\n") if not line.startswith("# ")]
    rows = [line.partition(" ->") for line in lines]
    return [(re.compile(pattern), new.strip().replace("␣", " ")) for pattern, _, new in rows]


def respell(rules, text):
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎"
CHARACTERS = str.maketrans(RAISED + LOWERED, "0123456789+-()n0123456789+-()")
for spelling, *characters in table("characters.txt"):
    if spelling[-1].isalpha():
        spelling += " "  # the next letter does not belong to the macro
    CHARACTERS |= str.maketrans(dict.fromkeys(characters, spelling))

MACROS = {}  # name of a macro -> spelling
for spelling, *names in table("macros.txt"):
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
\\operatorname *\{ *((?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp) *\} -> \\\1␣
\\(?:mathbf|mathit|mathsf|boldsymbol|bm) *\{ *([a-zA-Z]) *\} -> ␣\1␣
\\(?:mathrm|textrm) *\{ *([deixyz]) *\} -> ␣\1␣
""")
AFTER_MACROS = parse_rules(r"""
~ -> ␣
\\text +(?=\{) -> \\text
_ *(?:\{ *\\text\{ *(\w+) *\} *\}|\\text\{ *(\w+) *\}) -> _{\1\2}
_ *(?:\{ *\\(max|min) *\}|\\(max|min)(?![a-zA-Z])) -> _{\1\2}
\\text *\{ *,? *(and|or) *,? *\} -> ␣\\\1␣
(?<=[ \d}),])(and|or)(?=[ \d\\(])(?![^{}\\]*\}) -> ␣\\\1␣
\\?% -> \\text{ percent }
\^ *\{ *\\circ *\} -> ^\\circ
(\\(?:sin|cos|tan|cot|sec|csc)(?: ?\^\{?\d\}?)?) *[({] *([0-9.]+ *\^ *\\circ) *[)}] -> \1␣\2
(\\(?:sin|cos|tan|cot|sec|csc)(?: ?\^\{?\d\}?)?) *([0-9.]+) *\^ *\\circ -> \1(\2\\pi/180)
\^ *(?:\\prime|\{ *\\prime *\}) -> '
\{([^{}]*)\\choose([^{}]*)\} -> \\binom{\1}{\2}
\\(sqrt|frac) +(?=[\d{]|\\pi) -> \\\1
\\frac(\d|\\pi) ?(\d|\\pi) -> \\frac{\1}{\2}
\\frac(\d|\\pi) ?\{ -> \\frac{\1}{
\\frac(\{[^{}]*\}) ?(\d|\\pi) -> \\frac\1{\2}
\\sqrt ?(\d|\\pi) -> \\sqrt{\1}
\\sqrt *(\[ ?\d+ ?\]) *(\d) -> \\sqrt\1{\2}
\\binom *(\d) ?(\d) -> \\binom{\1}{\2}
\\frac\{ ?\\text\{([^{}]*)\} ?\}\{ ?\\text\{([^{}]*)\} ?\} -> \\text{\1/\2}
(?<=\d)_\{ ?\((\w+)\) ?\} -> _{\1}
([_^])\{ ?(\w) ?\}(?!\w) -> \1\2
(^|[-+=<>(,;{]) ?\{ ?([a-zA-Z]) ?\}(?= ?[_^]) -> \1\2
(^|[-+=<>(,;]) ?\{ ?([a-zA-Z] ?_(?:\w|\{\w+\})) ?\} -> \1\2
\((\w+)\) ?_ -> \1_
^ *\\text *\{ *((?:\\text\{dollar\} *)?[+-]?[.\d][^{}]*)\} *$ -> \1
\\(?:emptyset|varnothing)(?![a-zA-Z]) -> \\{\\}
\\mathbb *(?:R|\{ ?R ?\}) -> (-\\infty,\\infty)
""")
ENDS = parse_rules(r"""
[ ]+ -> ␣
^[ ]?=?[ ]? ->
(?<![,;: ])(?:[,;: ]*(?<!\.)\.)?[,;: ]*$ ->
""")
ROOTS = parse_rules(rf"""
# As programs write them
(?<![a-zA-Z\\])sqrt(?=[ ]?\() -> √
(?<![a-zA-Z\\])(sin|cos|tan|ln|log|exp)(?=[ ]?\() -> \\\1
(?<![a-zA-Z\\])(?<!\\text\{{)pi(?![a-zA-Z]) -> \\pi␣
\*\*[ ]?(-?\w+)(?![\w ]*\*\*) -> ^{{\1}}
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
        r"(?<![\d.])(?<!\d )([0-9]*)\.([0-9]*)"
        r"\\(?:overline|bar|dot) ?\{? ?([0-9]+) ?\}?(?!\d|\\dot)",
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
