r"""The answer in a text about a MATH problem, and the form in which two answers are compared.

The comparison is that of the data set's own evaluation: notation that does not matter is removed by string operations,
then the strings must be equal; 1/2 is \frac{1}{2}, but 0.25 is not \frac{1}{4}, and 1,000 is not 1000. We depart from
it only where its string operations misread TeX:

- \sqrt 2, \frac\pi4 and \frac{6}3 are read as TeX reads them (there, only \sqrt2, \frac12 and \frac1{72} are).
- \text{ ...} is a unit at the end of an answer, after something else (there, it cuts off all that follows:
  12\text{ and }13 would equal 12).
- A number without its leading zero gets one wherever it stands (there, only at the start, after a space or a brace).
- The spaces \, \; \: are removed as \! is, and % and $ also without a backslash.
- The short left side that is dropped, as in x = 5, consists of letters and digits (there, x >= 5 would equal 5).

Source: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_END_OF_UNBRACED_BOX = re.compile(r"\$|\n|\\[\])]")
_STATED = re.compile(r"answer is\b:?\s*(.*)", re.IGNORECASE)
_END_OF_SENTENCE = re.compile(r"\.(?=\s|$)")
_MATH_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")

_TEX_SPACE = re.compile(r"(?<!\\)\\[!,;: ]")
_SIZE_OF_BRACKET = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_UNIT = re.compile(r"(?<=\S) *\\text\{ (?:[^{}]|\{[^{}]*\})*\}(?:\^(?:[0-9]|\{[0-9]\}))?\.?$")
_DEGREES = re.compile(r"\^(?:\\circ|\{\\circ\})")
_NO_LEADING_ZERO = re.compile(r"(?<![0-9])\.(?=[0-9])")
_SHORT_LEFT_SIDE = re.compile(r"\w{0,2}=([^=]*)")
_INTEGERS = re.compile(r"(-?[0-9]+)/(-?[0-9]+)")


def find_answer(text: str) -> str | None:
    """The last boxed answer; without one, what follows the last "answer is"; None where there is neither."""
    return find_box(text) or _find_stated(text)


def find_box(text: str) -> str | None:
    r"""What the last box of a text holds; None where there is no box, or the last one is empty or never closed.

    A box is \boxed{...} or \fbox{...} with any braces inside, or, as some published solutions write it, \boxed 5 up to
    the end of the formula or line.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        return _END_OF_UNBRACED_BOX.split(text[start:], maxsplit=1)[0].strip().rstrip(" .") or None
    end = _argument_end(text, start)
    return text[start + 1 : end - 1].strip() or None if end is not None else None


def normalise_answer(answer: str) -> str:
    """An answer in the form in which answers are compared: equal strings are equal answers."""
    text = " ".join(answer.split())
    text = _TEX_SPACE.sub("", text).replace("\\\\", "\\")
    text = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    text = _SIZE_OF_BRACKET.sub("", text)
    # Before the spaces go: the one after the brace tells a unit from a word that is the answer.
    text = _UNIT.sub("", text)
    text = re.sub(r"\\?[$%]", "", text).replace(" ", "")
    text = _DEGREES.sub("", text)
    text = _NO_LEADING_ZERO.sub("0.", text)
    if equation := _SHORT_LEFT_SIDE.fullmatch(text):
        text = equation[1]
    text = _brace_arguments(text, "\\sqrt", 1)
    text = _brace_arguments(text, "\\frac", 2)
    if text == "0.5":
        return "\\frac{1}{2}"
    quotient = _INTEGERS.fullmatch(text)
    return f"\\frac{{{quotient[1]}}}{{{quotient[2]}}}" if quotient else text


def _find_stated(text: str) -> str | None:
    """The rest of the sentence after the last "answer is", without the signs around a formula."""
    stated = _STATED.findall(text)
    if not stated:
        return None
    sentence = _END_OF_SENTENCE.split(stated[-1], maxsplit=1)[0]
    # Again a period: in "$5.$" it stands within the formula.
    return _MATH_DELIMITER.sub("", sentence).replace("\\$", "").replace("$", "").strip().rstrip(" .") or None


def _brace_arguments(text: str, command: str, num_arguments: int) -> str:
    r"""The text with braces around the arguments of a command: \frac1{72} becomes \frac{1}{72}."""
    found = text.find(command)
    while found >= 0:
        start = found + len(command)
        for _ in range(num_arguments):
            end = _argument_end(text, start)
            if end is None:
                break
            if text[start] != "{":
                text = f"{text[:start]}{{{text[start:end]}}}{text[end:]}"
                end += 2
            start = end
        found = text.find(command, found + len(command))
    return text


def _argument_end(text: str, start: int) -> int | None:
    """Where the argument that starts here ends: a group in braces, a command or a character. None: it does not."""
    if text[start : start + 1] != "{":
        argument = re.compile(r"\\[A-Za-z]+|[^\\{}]").match(text, start)
        return argument.end() if argument else None
    depth = 0
    # A backslash and what follows it are one: \{ is no brace of a group.
    for symbol in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(symbol[0], 0)
        if depth == 0 and symbol[0] == "}":
            return symbol.end()
    return None
