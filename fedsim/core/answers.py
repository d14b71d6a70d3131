r"""Extracts the answer from generated text and compares it with the gold answer.

Arithmetic, in the order of precedence: after "####" (GSM8K), after the last "The answer is:" (MetaMathQA), in the last \boxed{} (MATH),
else the last number, as evaluations of GSM8K do, unless the text was cut off, which makes its last number arbitrary. Numbers are compared
by value, other expressions as normalised text. Multiple choice: the first of the options that the prompt's "Answer format" names, as in
the evaluation of LLM-Adapters (arXiv 2304.01933). Free text: the whole text, unless it was cut off, ignoring differences in white space.
Nothing is ever evaluated as code.
"""

import re
from fractions import Fraction

from fedsim.types import Example, Family

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_NUMBER = rf"(?<![\d.])(?:(?<![\w)])-)?(?:\\frac{{-?{_DECIMAL}}}{{{_DECIMAL}}}|{_DECIMAL}(?:/{_DECIMAL})?)"
_ALONE = re.compile(rf"(?:[A-Za-z]\w*\s*=\s*)?({_NUMBER})\s*%?(?:\s*[A-Za-z][A-Za-z .]*)?")
_ANY = re.compile(_NUMBER)
_OPTIONS = re.compile(r"Answer format:\s*(\S+)")

_NORMAL_FORM = [
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt(\d)", r"\\sqrt{\1}"),
    (r"\\(?:left|right)(?![A-Za-z])|\\[!,;:]|\^\{?\\circ\}?", ""),
    (r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r" \1"),
    (r"\\?[$%]|[\u20ac\u00a3]", ""),
    ("\u2212", "-"),
]
"""Rewrites that keep the value: (pattern, replacement), after the equivalence test of MATH (arXiv 2103.03874)."""


def options(prompt: str) -> list[str]:
    """Returns the options of a multiple-choice prompt, from its last "Answer format: a/b/c"; empty if there is none."""
    found = _OPTIONS.findall(prompt)
    return found[-1].rstrip(".").split("/") if found else []


def extract(text: str, example: Example, *, ended: bool = True) -> str | None:
    """Returns the answer that `text` gives to the example, or None if there is none; `ended` is False if the text was cut off."""
    if example.family is Family.commonsense:
        return _first_option(text, options(example.prompt))
    if example.family is Family.text:
        return " ".join(text.split()) if ended else None
    text = _normalize(text)
    if "####" in text:
        return _first_number(text.split("####")[1]) or _line(text.split("####")[1]) or None
    stated = _stated(text)
    if stated is not None:
        alone = _ALONE.fullmatch(stated)
        return alone[1] if alone else stated or None
    numbers = _ANY.findall(text) if ended else []
    return numbers[-1] if numbers else None


def is_correct(text: str, example: Example, *, ended: bool = True) -> bool:
    """Whether the answer in `text` is the gold answer: the same option, words or number, or else the same expression."""
    given = extract(text, example, ended=ended)
    if given is None or example.family is Family.commonsense:
        return given == example.answer
    if example.family is Family.text:
        return given == " ".join(example.answer.split())
    gold = value(example.answer)
    if gold is not None:
        return value(given) == gold
    return _squeeze(given) == _squeeze(_normalize(example.answer))


def value(text: str) -> Fraction | None:
    r"""Returns the number that `text` is, exactly: "1,080", "-2.50", "$18", "3/4", "\frac{3}{4}", "50%" (as 50), "7 apples"; else None."""
    alone = _ALONE.fullmatch(_normalize(text).strip().rstrip("."))
    if alone is None:
        return None
    plain = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", alone[1]).replace(",", "")
    numerator, _, denominator = plain.replace("--", "").partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or "1")
    except (ValueError, ZeroDivisionError):  # a zero denominator, or more digits than Python reads
        return None


def boxed(text: str) -> str | None:
    r"""Returns the content of the last complete \boxed{...}, inner braces included, or None; \fbox{7} and \boxed 7 count, as in MATH."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?<=\s)[^\s${}\\]+)", text))):
        if match[1] != "{":
            return match[1]
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end]
    return None


def _first_option(text: str, choices: list[str]) -> str | None:
    if not choices:
        return None
    found = re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, choices))})(?!\w)", text)
    return found[0] if found else None


def _stated(text: str) -> str | None:
    """Returns what follows the last "The answer is", or the content of the last box."""
    parts = re.split(r"[Tt]he answer is:?", text)
    if len(parts) > 1:
        return boxed(parts[-1]) or _line(re.split(r"\.\s", parts[-1], maxsplit=1)[0])
    return boxed(text)


def _first_number(text: str) -> str | None:
    found = _ANY.search(_line(text))
    return found[0] if found else None


def _line(text: str) -> str:
    """Returns the first line without a full stop at its end."""
    lines = text.strip().splitlines()
    return lines[0].strip().rstrip(".").strip() if lines else ""


def _normalize(text: str) -> str:
    for pattern, replacement in _NORMAL_FORM:
        text = re.sub(pattern, replacement, text)
    return text


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)
