"""Base and adapter in a chat say what each says alone, and what they say is only text."""

import os
import re
import signal
import textwrap
import threading
from io import StringIO

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cases import Model, perturb, tiny_llama
from evaluation.evaluated import CONFIGS, LLAMA, SPECIAL, word_tokenizer
from tensorpeft.evaluation.chat import run_chat
from tensorpeft.evaluation.conversation import Conversation, _AnswerStreamer

# A turn is "w90 question </s>" or "w91 answer </s>", the system's "w92 text </s>".
ROLES = {"user": "w90", "assistant": "w91", "system": "w92"}
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w90 ', 'assistant': 'w91 ', 'system': 'w92 '}[m.role] + m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)
QUESTIONS = ["w4 w5 w6", "w70 w8", "w30 w31 w32 w33"]
NEW = 16
PEFT = {"target_modules": LLAMA.targets, "task_type": "CAUSAL_LM"}
METHODS = {name: lambda config=config: config(init_weights=True, **PEFT) for name, config in CONFIGS.items()} | {
    "lora": lambda: LoraConfig(init_lora_weights=False, **PEFT),
    "dora": lambda: LoraConfig(init_lora_weights=False, use_dora=True, **PEFT),
    "ia3": lambda: IA3Config(init_ia3_weights=False, feedforward_modules=["down_proj"], **PEFT),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
# PEFT refuses DoRA in a mixed batch; of IA3 and prompt tuning it would silently put the adapter into every row.
APART = ("dora", "ia3", "prompt")


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """A function that saves a base and an adapter of the method on it, and returns the adapter's folder."""

    def save(method="dota", template=TEMPLATE, tokenizer=None, **config):
        folder = tmp_path_factory.mktemp("chat")
        model = Model("llama", lambda: tiny_llama(initializer_range=0.3, **config), [], "").fresh()
        tokenizer = tokenizer or word_tokenizer()
        tokenizer.chat_template = template
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        torch.manual_seed(3)
        adapted = get_peft_model(model, METHODS[method]())
        perturb(adapted, scale=1.0)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
        adapted.save_pretrained(folder / "tuned")
        return folder / "tuned"

    return save


@pytest.fixture(scope="module")
def dota(save):
    return save()


def talk(adapter, lines, **more):
    """What is printed, and the pairs of answers in it."""
    terminal = StringIO()
    run_chat(adapter, max_new_tokens=more.pop("max_new_tokens", NEW), terminal=terminal, source=StringIO(lines), **more)
    answers = re.findall("^base: ?(.*)\nadapter: ?(.*)$", terminal.getvalue(), re.MULTILINE)
    return terminal.getvalue(), answers


def load(adapter):
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "model")
    return PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def go_on(model, words, new_tokens=NEW):
    """The likeliest words after these, one by one: neither a cache nor padding nor transformers' generate."""
    tokenizer = word_tokenizer()
    ids = tokenizer(words)["input_ids"]
    start = len(ids)
    while len(ids) < start + new_tokens:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in (2, 3):  # the model's end and the tokenizer's
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def converse(model, questions, system=None, limit=None):
    """The model's answers in a conversation of its own."""
    turns, answers = [], []
    first = [] if system is None else [("system", system)]
    for question in questions:
        turns.append(("user", question))
        text = "".join(f"{ROLES[role]} {content} </s> " for role, content in first + turns) + "w91"
        while limit is not None and len(text.split()) > limit:
            del turns[:2]
            text = "".join(f"{ROLES[role]} {content} </s> " for role, content in first + turns) + "w91"
        answers.append(go_on(model, text))
        turns.append(("assistant", answers[-1]))
    return answers


def pairs(adapter, questions, **more):
    model = load(adapter)
    with model.disable_adapter():
        base = converse(model, questions, **more)
    return list(zip(base, converse(model, questions, **more), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_each_says_what_it_says_alone(save, method):
    adapter = save(method)
    expected = pairs(adapter, QUESTIONS)
    assert all(base != adapted for base, adapted in expected)
    printed, answers = talk(adapter, "\n".join(QUESTIONS))
    assert answers == expected
    assert ("one after the other" in printed) == (method in APART)


def test_new_forgets_what_was_said(dota):
    first, second = pairs(dota, [QUESTIONS[0]] * 2)
    assert first != second
    assert talk(dota, f"{QUESTIONS[0]}\n/new\n{QUESTIONS[0]}\n")[1] == [first, first]
    assert talk(dota, f"{QUESTIONS[0]}\n{QUESTIONS[0]}\n")[1] == [first, second]


def test_lines_that_are_no_questions(dota):
    printed, answers = talk(dota, f"\n  \n/help\n/what\n{QUESTIONS[0]}\n/quit\n{QUESTIONS[1]}\n")
    assert answers == pairs(dota, QUESTIONS[:1])
    assert printed.count("/new forgets the conversation") == 2
    assert "There is no /what." in printed


def test_nothing_asked_nothing_printed(dota):
    assert talk(dota, "")[0] == ""


def test_a_word_after_a_slash_and_more_is_a_question(dota):
    assert len(talk(dota, "/tmp/x w4\n")[1]) == 1


def test_system_message(dota):
    expected = pairs(dota, QUESTIONS, system="w7 w8")
    assert expected != pairs(dota, QUESTIONS)
    assert talk(dota, "\n".join(QUESTIONS), system="w7 w8")[1] == expected


def test_a_template_that_takes_no_system_message(save):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match=r"no system role. Leave --system out"):
        talk(save(template=refusing), "w4\n", system="w5")


def test_without_a_template_the_text_goes_on(save):
    adapter = save(template=None)
    model = load(adapter)
    printed, answers = talk(adapter, "\n".join(QUESTIONS), system="w7")
    texts = ["w7", "w7"]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        with model.disable_adapter():
            base = go_on(model, f"{texts[0]} {question}")
        assert answer == (base, go_on(model, f"{texts[1]} {question}"))
        texts = [f"{text} {question} {said}" for text, said in zip(texts, answer, strict=True)]
    assert printed.count("no chat template") == 1


def test_the_oldest_turns_are_left_out_of_a_long_conversation(save):
    adapter = save(max_position_embeddings=60)
    questions = QUESTIONS * 2
    expected = pairs(adapter, questions, limit=60 - NEW)
    assert expected != pairs(adapter, questions)
    printed, answers = talk(adapter, "\n".join(questions))
    assert answers == expected
    assert printed.count("oldest turns are left out") == 1


def test_a_question_longer_than_the_model_reads_is_not_asked(save):
    adapter = save(max_position_embeddings=60)
    printed, answers = talk(adapter, f"{QUESTIONS[0]}\n{'w9 ' * 60}\n{QUESTIONS[1]}\n")
    assert answers == pairs(adapter, QUESTIONS[:2], limit=60 - NEW)
    assert "The question makes 63 tokens, the model reads 1 to 44" in printed


def test_an_answer_leaves_half_of_a_short_model_to_the_conversation(save):
    _, [(base, adapted)] = talk(save(max_position_embeddings=24), "w4\n", max_new_tokens=None)
    assert max(len(base.split()), len(adapted.split())) == 12


def test_a_temperature_draws_and_its_seed_repeats(dota):
    drawn = [talk(dota, QUESTIONS[0], temperature=1.0, seed=seed)[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != pairs(dota, QUESTIONS[:1])


@pytest.fixture
def interrupt(monkeypatch):
    """Presses Ctrl-C, so many times, when the adapter has written three words of its first answer."""
    ask, pressed = Conversation.ask, []

    def press(times):
        def interrupted(self, question, on_answer, stop):
            def watch(index, text):
                on_answer(index, text)
                if index == 1 and len(text.split()) == 3 and not pressed:
                    pressed.append(times)
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)

            return ask(self, question, watch, stop)

        monkeypatch.setattr(Conversation, "ask", interrupted)

    before = signal.getsignal(signal.SIGINT)
    yield press
    assert pressed
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_an_interrupt_stops_one_answer(save, interrupt, method):
    adapter = save(method)
    interrupt(1)
    printed, answers = talk(adapter, "\n".join([QUESTIONS[0], "/new", *QUESTIONS]))
    whole = pairs(adapter, QUESTIONS)
    assert answers[1:] == whole
    assert len(answers[0][1].split()) == 4  # the word that is being computed comes yet
    assert whole[0][1].startswith(answers[0][1])
    assert printed.count("(stopped)") == 1


def test_a_second_interrupt_leaves(dota, interrupt):
    interrupt(2)
    assert talk(dota, "\n".join(QUESTIONS)) == ("", [])


def hostile_tokenizer():
    """Every word would do something to a terminal, or be markup to rich."""
    kinds = ["[red]{}[/red]", "\x1b[38m{}", "\x1b]0;{}\x07", "[/]{}", "\u202e{}", "\x9b{}m", "a\rb{}", "a\nbase:{}"]
    vocabulary = {token: k for k, token in enumerate(SPECIAL.values())}
    vocabulary |= {kinds[k % len(kinds)].format(k): k for k in range(4, 96)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)


def type_into_terminal(adapter, keys, **more):
    """What a terminal gets when these keys are pressed."""
    ours, theirs = os.openpty()
    shown = bytearray()

    def watch():
        try:
            while data := os.read(ours, 65536):
                shown.extend(data)
        except OSError:  # Linux says so that the other end is closed
            pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        os.write(ours, keys)
        with open(os.dup(theirs), "w", encoding="utf-8") as terminal, open(os.dup(theirs)) as source:
            run_chat(adapter, terminal=terminal, source=source, **more)
    finally:
        os.close(theirs)
        watcher.join(timeout=30)
        os.close(ours)
    return shown.decode()


def test_text_of_a_model_does_nothing_to_a_terminal(save, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    adapter = save(tokenizer=hostile_tokenizer(), template=None)
    piped, _ = talk(adapter, "x\n", max_new_tokens=60)
    shown = type_into_terminal(adapter, b"x\n\x04", max_new_tokens=60)
    for printed in (piped, shown):
        assert "[red]" in printed
        assert "[/]" in printed
        assert "\N{SYMBOL FOR ESCAPE}[38m" in printed
        assert "\N{SYMBOL FOR ESCAPE}]0;" in printed
        assert not re.search("\x1b\\[38m|\x1b\\]|\x07|\u202e|\x9b|a\rb", printed)
    assert len(re.findall("^base:", piped, re.MULTILINE)) == 1


def test_columns_on_a_terminal(dota, monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "60", "LINES": "6"}.items():
        monkeypatch.setenv(name, value)
    expected = pairs(dota, QUESTIONS[:1])[0]
    shown = type_into_terminal(dota, f"{QUESTIONS[0]}\n\x04".encode(), max_new_tokens=NEW)
    # What follows a line that was taken away, unless it is the next that goes.
    frames = [re.sub("\x1b\\[[?0-9]*[a-zA-Z]", "", part) for part in re.split(r"\x1b\[2K(?!\x1b\[1A)", shown)]
    assert len(frames) > 1  # how many a fast answer has is up to the clock
    # While they grow the columns stay within the terminal, or they could not be taken away; then they are whole.
    assert all(len(frame.splitlines()) < 6 for frame in frames[1:-1])
    header, _, *lines = frames[-1].split("you:")[0].splitlines()
    right = header.index("tuned")
    columns = [[line[part].strip() for line in lines] for part in (slice(right), slice(right, None))]
    wrapped = [textwrap.wrap(answer, width=27) for answer in expected]
    assert [[line for line in column if line] for column in columns] == wrapped
    assert len(lines) > 2


def test_an_answer_keeps_the_space_it_begins_with():
    words = Tokenizer(WordLevel({"▁once": 0, "▁upon": 1, "▁a": 2}, unk_token="▁a"))
    words.decoder = decoders.Metaspace()
    heard = []
    streamer = _AnswerStreamer(PreTrainedTokenizerFast(tokenizer_object=words), [], lambda *said: heard.append(said))
    streamer.put(torch.tensor([[0, 1]]))
    streamer.put(torch.tensor([2]))
    assert heard == [(0, " a")]


def test_nothing_is_heard_of_a_row_after_its_end():
    heard = {}
    streamer = _AnswerStreamer(word_tokenizer(), [9, 10], heard.__setitem__)
    streamer.put(torch.tensor([[4], [5]]))
    for tokens in ([20, 30], [9, 31], [21, 32], [21, 10]):
        streamer.put(torch.tensor(tokens))
    streamer.end()
    assert heard == {0: " w20", 1: " w30 w31 w32"}


def test_a_character_is_heard_when_all_its_bytes_are_there():
    vocabulary = {letter: k for k, letter in enumerate(sorted(ByteLevel.alphabet()))}
    letters = Tokenizer(BPE(vocabulary, []))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    heard = []
    streamer = _AnswerStreamer(tokenizer, [], lambda row, text: heard.append(text))
    streamer.put(torch.tensor([tokenizer("a")["input_ids"]]))
    for token in tokenizer("né€")["input_ids"]:
        streamer.put(torch.tensor([token]))
    assert heard == ["n", "né", "né€"]
    streamer.put(torch.tensor(tokenizer("€")["input_ids"][:1]))
    streamer.end()
    assert heard[3:] == ["né€\ufffd"]


def test_a_base_alone_is_refused(dota):
    with pytest.raises(ValueError, match="expected a saved adapter"):
        run_chat(dota.parent / "model")


def test_an_adapter_that_does_not_write_is_refused(save, dota, tmp_path):
    adapted = load(dota)
    adapted.peft_config["default"].task_type = "FEATURE_EXTRACTION"
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FEATURE_EXTRACTION: expected CAUSAL_LM"):
        run_chat(tmp_path)


@pytest.mark.parametrize(("setting", "value"), [("max_new_tokens", 0), ("temperature", 0.0)])
def test_settings_out_of_range(dota, setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}: expected"):
        run_chat(dota, **{setting: value})


def test_an_answer_as_long_as_what_the_model_reads(save):
    with pytest.raises(ValueError, match="max_new_tokens=16: the model reads 16 tokens"):
        talk(save(max_position_embeddings=16), "w4\n")
