"""Command lines, recipes and model files that were damaged at random: one line on stderr and exit code 2, always.

Every case has a seed, and runs in this process. What a command prints, and whether it succeeds, is not looked at:
only that it neither raises, nor hangs, nor says more than a line.
"""

import io
import json
import random
import shutil
import signal
import sys
from contextlib import contextmanager

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
pytest.importorskip("rich")
from commanded import RECIPE, REWARDED, fill
from tensorpeft_cli import main

SECONDS = 60  # of a case; those that pass take less than one
HOSTILE_WORDS = ["", " ", "-1", "0", "1e309", "nan", "9" * 30, "9" * 5000, "+3", "0x10", "1_000", "²", "1.5", "None"]
HOSTILE_WORDS += ["[", "]", "(", "*", "\\", "{a", "[/b]", "=", "a=b", "@x", "%s", "$HOME", "ü😀", "\x1b[31m", "x" * 300]
HOSTILE_WORDS += ["../../x", "/dev/null", "/dev/null/x", ".", "..", "~", "--", "--rank", "-h=", "a,b", "a,,b", "true"]
HOSTILE_WORDS += ["rows.jsonl", "base", "damaged", "hub:x", "package:x", "null"]
HOSTILE_VALUES = [None, True, False, -1, 0, 1, 3, 1.5, -1e300, 10**12, 10**30, float("inf"), float("nan")]
HOSTILE_VALUES += ["", "x", "no", "[", "(", "1", "a|b", "../x", "\x1b[31m", "[/b]", "x" * 300, "\0"]
HOSTILE_VALUES += [[], [1], ["["], {}, {"a": 1}, [None], [[1]]]
HOSTILE_KEYS = ["", "x", "[b]", "../../x", "rates", "quantize", "inherits"]
LINES = [
    "plan base --methods lora --length 8",
    "plan base --methods lora,lorta --length 8 --rank 2 --batch 1 --json plan.json",
    "plan base --methods lotr --length 8 --budget 1k --gpu 24GB --target-modules q_proj v_proj",
    "plan base --methods lora --length 8 --maps --target-modules .*q_proj",
    "train recipe.yaml output=out trainer.max_steps=1 --smoke",
    "train recipe.yaml output=out seeds=[0,1] --resume",
    "compare recipe.yaml --methods lora,lotr --seeds 1 --output out --timing-rounds 0 --budget 1k",
    "quantize base out --r 2 --num-cores 3 --rounds 1 --target-modules q_proj",
    "export lora adapter out",
    "export dense adapter out --dtype float32 --base base",
    "inspect base --r 2 --output out --target-modules q_proj --budget 1k",
    "inspect quantization base --r 2 --rounds 1 --output out --text rows.jsonl --target-modules q_proj",
    "evaluate base --task instructions --data rows.jsonl --rows 1 --output out",
    "evaluate adapter --base base --task instructions --data rows.jsonl --max-length 8 --batch-size 1",
    "chat adapter --base base --max-new-tokens 1 --sample 0.5",
    "recipes small/stories_sft",
    "export gguf adapter out --outtype q8_0",
    "export gguf adapter out --merged --base base",
    "export delta adapter out --bits 4 --check rows.jsonl",
]


class HungError(BaseException):
    """A case took too long."""


@contextmanager
def limited(seconds):
    def stop(number, frame):
        raise HungError(f"after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, an adapter, rows and a recipe."""
    return fill(tmp_path_factory.mktemp("fuzzed"))


def leaves(tree, path=()):
    """Paths to everything within a tree of JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def damage_tree(draw, tree):
    """A tree of JSON with something in it replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice([1, 1, 2])):
        *path, last = draw.choice(list(leaves(tree)))
        node = tree
        for key in path:
            node = node[key]
        match draw.randrange(4):
            case 0 if isinstance(node, dict):
                del node[last]
            case 1 if isinstance(node, dict):
                node[draw.choice(HOSTILE_KEYS)] = draw.choice(HOSTILE_VALUES)
            case _:
                node[last] = draw.choice(HOSTILE_VALUES)
    return tree


def damage_text(draw, text):
    """Bytes with some cut off, changed or put in."""
    data, at = bytearray(text), draw.randrange(len(text))
    match draw.randrange(4):
        case 0:
            return bytes(data[:at])
        case 1:
            data[at] = draw.randrange(256)
        case 2:
            data[at:at] = draw.randbytes(draw.choice([1, 8]))
        case 3:
            data[at : at + draw.choice([1, 8, 100])] = b""
    return bytes(data)


def damage_line(draw, place):
    words = draw.choice(LINES).split()
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.randrange(1, len(words))
        match draw.randrange(5):
            case 0:
                words[at:at] = [draw.choice(HOSTILE_WORDS)]
            case 1 if len(words) > 2:
                del words[at]
            case 2:
                words[at:at] = draw.choice(LINES).split()[-2:]
            case _:
                words[at] = draw.choice(["", words[at].partition("=")[0] + "="]) + draw.choice(HOSTILE_WORDS)
    return words


def damage_recipe(draw, place):
    recipe = draw.choice([RECIPE, REWARDED])
    text = json.dumps(damage_tree(draw, recipe))
    if draw.random() < 0.2:
        text = damage_text(draw, json.dumps(recipe).encode()).decode(errors="replace")
    (place / "damaged.yaml").write_text(text, encoding="utf-8")
    line = draw.choice(
        ["train damaged.yaml", "train damaged.yaml --smoke", "compare damaged.yaml --timing-rounds 0 --methods lora"]
    )
    return line.split()


def damage_files(draw, place):
    """A command on a model or an adapter with a file that is damaged."""
    name = draw.choice(
        ["base/config.json", "base/config.json", "base/model.safetensors", "adapter/adapter_config.json"]
    )
    name = draw.choice([name, name, "adapter/adapter_model.safetensors", "base/tokenizer.json", "rows.jsonl"])
    if name.endswith("config.json") and draw.random() < 0.8:
        damaged = json.dumps(damage_tree(draw, json.loads((place / name).read_text(encoding="utf-8")))).encode()
    else:
        damaged = damage_text(draw, (place / name).read_bytes())
    (place / name).write_bytes(damaged)
    of_base, of_adapter = [k for k, line in enumerate(LINES) if " base" in line], [8, 9, 13, 14, 16, 17, 18]
    return LINES[draw.choice(of_base if name.startswith("base") else of_adapter)].split()


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(50), marks=pytest.mark.slow, id="some"),
        pytest.param(range(50, 150), marks=[pytest.mark.thorough, pytest.mark.slow], id="more"),
        *(pytest.param(range(k, k + 100), marks=pytest.mark.soak, id=f"from {k}") for k in range(150, 650, 100)),
    ],
)
@pytest.mark.parametrize("damage", [damage_line, damage_recipe, damage_files])
def test_what_is_damaged_is_told_in_one_line(damage, seeds, place, tmp_path, monkeypatch, capsys):
    for seed in seeds:
        draw, folder = random.Random(f"{damage.__name__} {seed}"), tmp_path / str(seed)
        shutil.copytree(place, folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6\n"))
        words = damage(draw, folder)
        capsys.readouterr()
        try:
            with limited(SECONDS):
                code = main(words)
        except SystemExit as ended:  # --help
            code = ended.code
        error = capsys.readouterr().err
        assert code in (0, 1, 2), (seed, words)
        if code == 2:
            said = [line for line in error.splitlines() if line.startswith("tensorpeft: ")]
            assert len(said) == 1, (seed, words, error)
            assert error.splitlines()[-1] == said[0], (seed, words, error)
        assert "Traceback" not in error, (seed, words)
        shutil.rmtree(folder)
