import random
import re

import pytest

from tensorpeft.tasks.llm_adapters import ANSWERS, ENDINGS, FAMILIES, OPTIONS, SOLUTIONS, TRUE_FALSE, as_question, score


@pytest.mark.parametrize(
    ("labels", "text", "answer"),
    [
        (TRUE_FALSE, "the correct answer is false", "false"),
        (TRUE_FALSE, "It is untrue, hence false", "true"),
        (TRUE_FALSE, "TRUE", None),
        (TRUE_FALSE, "True or false?", "false"),
        (TRUE_FALSE, "", None),
        (TRUE_FALSE, "yes", None),
        (SOLUTIONS, "the correct answer is solution2 not solution1", "solution2"),
        (SOLUTIONS, "Solution1 is wrong. solution 1 too", None),
        (SOLUTIONS, "answer1", None),
        (ANSWERS[:3], "the correct answer is answer12", "answer1"),
        (ANSWERS[:3], "answer0 answer6 answer5", "answer5"),
        (ANSWERS[:3], "answer\n2, no: answer3", "answer3"),
        (ENDINGS, "ending5 ending4", "ending4"),
        (OPTIONS, "option3option2", "option2"),
        # A model that goes on with a question of its own has answered before.
        (TRUE_FALSE, "the correct answer is false\n\n### Instruction:\ntrue?\n\n### Response:\ntrue", "false"),
        (TRUE_FALSE, "I cannot say.\n\n### Instruction:\nWell?\n\n### Response:\ntrue", None),
        (TRUE_FALSE, "### Response:\nthe correct answer is false", "false"),
    ],
)
def test_the_first_label_of_the_family_counts(labels, text, answer):
    for gold, label in enumerate(labels):
        scored = score(text, as_question("Which one?", labels, gold, key=""))
        assert scored.answer == answer
        assert scored.metrics == {"accuracy": 1.0 if answer == label else 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_names_its_own_label(family):
    question = as_question("Which one?", family, 1, key="")
    assert [score(choice, question).answer for choice in question.choices] == list(family)
    assert [score(choice, question).metrics["accuracy"] for choice in question.choices].index(1.0) == 1


def test_scores_are_those_of_the_official_evaluation_with_or_without_the_prompt():
    question = as_question("Which one?", ANSWERS[:3], 0, key="")
    pieces = ["answer1", "answer2", "answer5", "Answer1", "### Response:", "### Instruction:", "\n", "12", "it is "]
    pick = random.Random(0)
    for _ in range(2000):
        text = "so " + "".join(pick.choices(pieces, k=pick.randint(0, 6)))
        # What it does with a decoded output, which begins with the prompt.
        found = re.findall(r"answer[1-5]", (question.prompt + text).split("### Response:")[1])
        assert score(text, question).answer == (found[0] if found else None)
        assert score(question.prompt + text, question) == score(text, question)
