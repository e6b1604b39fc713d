"""Scores of answers in words: F1 and exact match as the official evaluations of SQuAD v1.1 and of DROP define them.

Sources: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", arXiv 1606.05250, section 6.1;
Dua et al., "DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning Over Paragraphs", arXiv 1903.00161,
section 5.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

# What stands between the spans of an answer that has several, in a response and in a generated text.
SPAN_SEPARATOR = " and "

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normal_form(text: str) -> str:
    """The text in lower case, without ASCII punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def squad_scores(
    text: str,
    answers: Sequence[str],  # at least one; each is right
) -> dict[str, float]:
    """SQuAD's "F1" and "exact match" of a text: the largest over the answers, after `squad_normal_form`.

    F1 = 2 |common words| / (|words of the text| + |words of the answer|), where words count as often as they occur; it
    is 0 where nothing is common, also where both are empty.
    """
    found = squad_normal_form(text)
    right = [squad_normal_form(answer) for answer in answers]
    return {
        "F1": max(_squad_f1(found.split(), answer.split()) for answer in right),
        "exact match": float(found in right),
    }


def drop_scores(
    text: str,
    answers: Sequence[Sequence[str]],  # at least one; each is right and has one span or several
) -> dict[str, float]:
    """DROP's "F1" and "exact match" of a text: the largest over the answers.

    Text and answer are compared span by span. Spans are paired one to one so that the sum of their F1 is largest; the
    sum divided by the larger number of spans, rounded to two digits, is the F1. A pair's F1 compares the sets of words,
    and is 0 where the answer's span has numbers of which the text's span has none. The match is exact where the spans,
    in any order, are equal. Words are split at spaces and hyphens; numbers are compared by value.

    The official evaluation is given a list of spans, a generated text is one string. It is read as one span where the
    answer is one; else it is split at " and ", and so is the answer, as a span may have an " and " of its own.
    """
    scores = [_drop_scores_of_one(text, answer) for answer in answers]
    return {"F1": max(f1 for f1, _ in scores), "exact match": max(exact for _, exact in scores)}


def _squad_f1(found: list[str], right: list[str]) -> float:
    num_common = (Counter(found) & Counter(right)).total()
    return 2 * num_common / (len(found) + len(right)) if num_common else 0.0


def _drop_scores_of_one(text: str, answer: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) against one answer."""
    found, right = [text], list(answer)
    if len(answer) > 1:
        found, right = text.split(SPAN_SEPARATOR), SPAN_SEPARATOR.join(answer).split(SPAN_SEPARATOR)
    found, right = [_drop_normal_form(span) for span in found], [_drop_normal_form(span) for span in right]
    pairs = np.array([[_drop_f1(set(one.split()), set(other.split())) for other in right] for one in found])
    f1 = pairs[linear_sum_assignment(pairs, maximize=True)].sum() / max(pairs.shape)
    # Sets and lengths, not sorted lists: the official evaluation does not count how often a span is repeated.
    return float(np.round(f1, 2)), float(len(found) == len(right) and set(found) == set(right))


def _drop_normal_form(text: str) -> str:
    return " ".join(filter(None, map(_drop_word, re.split("[ -]", text.lower()))))


def _drop_word(word: str) -> str:
    """A word without punctuation, an article as nothing, a number as Python writes its value: "1,000" is "1000.0"."""
    if not _is_number(word):  # the point of 2.5 is no punctuation
        word = word.translate(_WITHOUT_PUNCTUATION)
    return str(float(word)) if _is_number(word) else " ".join(_ARTICLES.sub(" ", word).split())


def _drop_f1(found: set[str], right: set[str]) -> float:
    numbers = set(filter(_is_number, right))
    if numbers and not numbers & found:
        return 0.0
    num_words = len(found) + len(right)
    return 2 * len(found & right) / num_words if num_words else 1.0


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
