import pytest

from evaluation.evaluated import GPT2, LLAMA, merging_tokenizer, word_tokenizer
from tensorpeft.evaluation.tokens import (
    TokenRow,
    cut_end,
    cut_start,
    encode_prompts,
    encode_responses,
    find_limit,
    pad_tokens,
    with_end,
)


def pieces(tokenizer, row):
    tokens = tokenizer.convert_ids_to_tokens(row.ids)
    return tokens[: row.start], tokens[row.start :]


def test_a_response_begins_after_the_prompt():
    tokenizer = word_tokenizer(bos=True)
    [[row]] = encode_responses(tokenizer, ["w4 w5"], [[" w6 w7"]])
    assert pieces(tokenizer, row) == (["<s>", "w4", "w5"], ["w6", "w7"])
    assert row.num_tokens == 2


def test_a_token_of_both_belongs_to_the_response():
    tokenizer = merging_tokenizer()
    [[row]] = encode_responses(tokenizer, ["ca"], [["bd"]])  # "ab" is one token
    assert pieces(tokenizer, row) == (["<s>", "c"], ["ab", "d"])
    [[row]] = encode_responses(tokenizer, ["c "], [["a"]])  # and so is " a"
    assert pieces(tokenizer, row) == (["<s>", "c"], ["▁a"])


def test_responses_to_one_prompt_begin_at_the_same_place():
    tokenizer = merging_tokenizer()
    first, second = next(encode_responses(tokenizer, ["ca"], [["b", "d"]]))
    assert pieces(tokenizer, first) == (["<s>", "c"], ["ab"])
    assert pieces(tokenizer, second) == (["<s>", "c"], ["a", "d"])


def test_an_end_that_the_tokenizer_adds_is_no_part_of_the_prompt():
    tokenizer = word_tokenizer(pairs=True)
    [[row]] = encode_responses(tokenizer, ["w4 w5"], [[" w6"]])
    assert pieces(tokenizer, row) == (["<s>", "w4", "w5"], ["w6", "</s>"])


def test_nothing_predicts_the_first_token_of_a_text():
    tokenizer = word_tokenizer()
    [[row]] = encode_responses(tokenizer, [""], [["w4 w5 w6"]])
    assert pieces(tokenizer, row) == (["w4"], ["w5", "w6"])


def test_the_end_is_added_once():
    tokenizer = word_tokenizer()
    assert with_end(tokenizer, "w4") == with_end(tokenizer, "w4</s>") == "w4</s>"


def test_prompts_lose_their_beginning_but_not_its_token():
    tokenizer = word_tokenizer(bos=True)
    rows = encode_prompts(tokenizer, ["w4 w5 w6 w7", "w4"], 3)
    assert tokenizer.convert_ids_to_tokens(rows[0].ids) == ["<s>", "w6", "w7"]
    assert [row.cut for row in rows] == [True, False]
    [row] = encode_prompts(word_tokenizer(), ["w4 w5 w6 w7"], 3)
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["w5", "w6", "w7"]


def test_choices_are_compared_after_the_same_part_of_the_prompt():
    rows = [TokenRow([4, 5, 6, 7, 8], 3), TokenRow([4, 5, 6, 7], 3)]
    assert cut_start(rows, 4, word_tokenizer()) == [TokenRow([5, 6, 7, 8], 2, True), TokenRow([5, 6, 7], 2, True)]
    with pytest.raises(ValueError, match="max_length=2: a response has 2 tokens, and at least one of its prompt"):
        cut_start(rows, 2, word_tokenizer())


def test_other_rows_lose_their_end():
    assert cut_end(TokenRow([4, 5, 6], 2), 2) == TokenRow([4, 5], 2, cut=True)
    assert cut_end(TokenRow([4, 5, 6], 2), 3) == TokenRow([4, 5, 6], 2)
    assert cut_end(TokenRow([4, 5, 6], 2), 1).num_tokens == 0


def test_the_limit_is_the_models_unless_less_is_asked_for():
    model, tokenizer = GPT2.fresh(), word_tokenizer()  # 40 positions
    assert find_limit(model, tokenizer, None) == 40
    assert find_limit(model, tokenizer, None, reserved=10) == 30
    assert find_limit(model, tokenizer, 12, reserved=10) == 12
    with pytest.raises(ValueError, match="max_length=31: the model reads at most 30 tokens before 10 new ones"):
        find_limit(model, tokenizer, 31, reserved=10)
    with pytest.raises(ValueError, match="max_new_tokens=40: the model reads 40 tokens, prompt included"):
        find_limit(model, tokenizer, None, reserved=40)
    tokenizer.model_max_length = 8
    assert find_limit(LLAMA.fresh(), tokenizer, None) == 8


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_masked(left):
    batch = pad_tokens([TokenRow([4, 5], 1), TokenRow([6], 1)], word_tokenizer(), "cpu", left)
    assert batch["input_ids"].tolist() == [[4, 5], [0, 6] if left else [6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1] if left else [1, 0]]
