import random
import textwrap
from dataclasses import replace

import pytest

pytest.importorskip("omegaconf")
from tensorpeft.training.recipe import DataRecipe, Recipe, load_recipe

BASE = "model: m\ntask: rte\ndata: {train: a.tsv, validation: b.tsv}\n"
PARENT = """
model: m
task: rte
adapter: {method: dota, r: 16, num_cores: 5}
data:
  train: {hub: A, name: x, split: train}
  validation: 100
  test: {rte: a.tsv, mrpc: {hub: B, name: y, split: test}}
trainer: {learning_rate: 1e-3, warmup_steps: 10}
values: {small: {method: lora, r: 2}, method: lora, rows: {rte: 7}}
smoke:
  adapter: {r: 4, num_cores: 3}
  data: {train: {hub: S, name: z, split: train}, validation: 8}
  trainer: {max_steps: 8}
"""
DOTA, SMALL_DOTA = {"method": "dota", "r": 16, "num_cores": 5}, {"method": "dota", "r": 4, "num_cores": 3}


@pytest.fixture
def load(tmp_path):
    """Writes files by name and loads "recipe"."""

    def run(text, *overrides, smoke=False, **files):
        for name, content in {"recipe": text, "parent": PARENT, **files}.items():
            (tmp_path / f"{name}.yaml").write_text(textwrap.dedent(content), encoding="utf-8")
        return load_recipe(tmp_path / "recipe.yaml", overrides, smoke)

    return run


@pytest.fixture
def refused(load):
    """Loads what is refused with a message."""

    def run(message, *arguments, **keywords):
        with pytest.raises(ValueError, match=rf"(?s){message}"):
            load(*arguments, **keywords)

    return run


def test_the_least_that_a_recipe_says(load):
    assert load(BASE) == Recipe(model="m", task="rte", data=DataRecipe(train="a.tsv", validation="b.tsv"))


def test_values_of_yaml(load):
    text = BASE + "trainer: {a: 1e-3, b: 1E5, c: .5, d: 3, e: '1e-3', f: yes, g: 'no', h: [1, x], i: no}\nseeds: 3\n"
    found = load(text).trainer
    assert found == {
        "a": 0.001,
        "b": 1e5,
        "c": 0.5,
        "d": 3,
        "e": "1e-3",
        "f": True,
        "g": "no",
        "h": [1, "x"],
        "i": False,
    }
    assert [type(found[key]) for key in "abd"] == [float, float, int]
    assert load(text).seeds == (3,)


# Inheritance


def test_a_file_is_put_on_those_that_it_inherits(load):
    found = load(
        "inherits: middle.yaml\ntrainer: {b: 3}\n",
        middle="inherits: base.yaml\ntrainer: {a: 2, b: 2}\noutput: middle\n",
        base=BASE + "trainer: {a: 1, b: 1, c: 1}\noutput: base\nseeds: [1, 2]\n",
    )
    assert (found.trainer, found.output, found.seeds) == ({"a": 2, "b": 3, "c": 1}, "middle", (1, 2))


def test_a_parent_is_looked_for_beside_its_heir(tmp_path):
    for folder in ("a/b", "c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a/b/recipe.yaml").write_text("inherits: ../../c/middle.yaml\n")
    (tmp_path / "c/middle.yaml").write_text("inherits: base.yaml\ntask: cola\n")
    (tmp_path / "c/base.yaml").write_text(BASE)
    assert load_recipe(tmp_path / "a/b/recipe.yaml").task == "cola"
    (tmp_path / "c/base.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"middle\.yaml: inherits: no recipe .*base\.yaml: neither"):
        load_recipe(tmp_path / "a/b/recipe.yaml")


@pytest.mark.parametrize(
    "files",
    [
        {"text": "inherits: recipe.yaml\n"},
        {"text": "inherits: other.yaml\n", "other": "inherits: recipe.yaml\n"},
        {"text": "inherits: other.yaml\n", "other": "inherits: third.yaml\n", "third": "inherits: other.yaml\n"},
    ],
)
def test_files_that_inherit_each_other(refused, files):
    refused(r"\.yaml: it inherits itself\. Remove inherits from it or from .*\.yaml", **files)


@pytest.mark.parametrize("parent", ["[parent.yaml, other.yaml]", "3", "{a: b}"])
def test_a_parent_is_one_file(refused, parent):
    refused(r"recipe\.yaml: inherits=.*: expected the path of one file", f"inherits: {parent}\n")


def test_a_source_is_replaced_whole_and_the_rest_of_data_is_not(load):
    found = load("inherits: parent.yaml\ndata: {train: {hub: C, split: all}, test: {rte: b.tsv}}\n").data
    assert found == DataRecipe(train={"hub": "C", "split": "all"}, validation=100, test={"rte": "b.tsv"})
    assert load("inherits: parent.yaml\ndata: {test: null}\n").data.test is None
    assert load("inherits: parent.yaml\ndata: {train: [c.tsv]}\n").data.train == ["c.tsv"]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("adapter: {r: 8}", {**DOTA, "r": 8}),
        ("adapter: {method: dota, r: 8}", {**DOTA, "r": 8}),
        ("adapter: {method: lora, r: 8}", {"method": "lora", "r": 8}),
        ("adapter: {method: '${values.method}', r: 8}", {"method": "lora", "r": 8}),
        ("adapter: ${values.small}", {"method": "lora", "r": 2}),
        ("adapter: null", None),
        ("", DOTA),
    ],
)
def test_an_adapter_is_replaced_by_one_of_another_method_only(load, section, expected):
    assert load(f"inherits: parent.yaml\n{section}\n").adapter == expected


def test_a_method_that_a_value_names_keeps_the_fields_beside_it(load):
    base = BASE + "values: {method: dota}\nadapter: {method: '${values.method}', r: 8}\n"
    assert load("inherits: base.yaml\nvalues: {method: lora}\n", base=base).adapter == {"method": "lora", "r": 8}


def test_null_takes_back_what_is_said_below(load):
    found = load("inherits: parent.yaml\ntrainer: {warmup_steps: null}\nseeds: null\noutput: null\ndescription: null\n")
    assert found.trainer == {"learning_rate": 1e-3, "warmup_steps": None}  # the trainer's arguments know what it means
    assert (found.seeds, found.output, found.description) == ((0,), "runs/train", "")
    below = BASE + "evaluate: {beta: 1}\nquantize: {rounds: 5}\nmodel_arguments: {dtype: float32}\nseeds: [4]\n"
    found = load("inherits: base.yaml\nevaluate: null\nquantize: {rounds: null}\nmodel_arguments: null\n", base=below)
    assert (found.evaluate, found.quantize, found.model_arguments, found.seeds) == ({}, {}, {}, (4,))
    assert load("inherits: base.yaml\nquantize: null\n", base=below).quantize is None
    below = BASE.replace("}", ", seed: 3, loss_on: text}")
    found = load("inherits: base.yaml\ndata: {seed: null, loss_on: null}\n", base=below).data
    assert (found.seed, found.loss_on) == (0, "response")


# Smoke


def test_smoke_sections_are_put_on_in_the_order_of_their_files(load):
    plain = load("inherits: parent.yaml\n")
    assert (plain.adapter, plain.data.validation, "max_steps" in plain.trainer) == (DOTA, 100, False)
    found = load("inherits: parent.yaml\ntrainer: {max_steps: 99, warmup_steps: 1}\n", smoke=True)
    assert found.trainer == {"learning_rate": 1e-3, "warmup_steps": 1, "max_steps": 8}
    assert found.adapter == SMALL_DOTA
    assert found.data == replace(plain.data, train={"hub": "S", "name": "z", "split": "train"}, validation=8)
    found = load("inherits: parent.yaml\nsmoke: {trainer: {max_steps: 2}, output: small}\n", smoke=True)
    assert (found.trainer["max_steps"], found.output, found.adapter) == (2, "small", SMALL_DOTA)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter: {r: 8}", SMALL_DOTA),
        ("adapter: {method: lora, r: 8}", {"method": "lora", "r": 8}),
        ("adapter: null", None),
        ("adapter: ${values.small}", {"method": "lora", "r": 2}),
        ("smoke: {adapter: {method: lora, r: 1}}", {"method": "lora", "r": 1}),
        ("smoke: {adapter: null}", None),
        ("smoke: {adapter: '${values.small}'}", {"method": "lora", "r": 2}),
        ("adapter: {method: lora, r: 8}\nsmoke: {adapter: {r: 1}}", {"method": "lora", "r": 1}),
    ],
)
def test_what_a_smoke_section_says_of_an_adapter_goes_with_that_adapter(load, text, expected):
    assert load(f"inherits: parent.yaml\n{text}\n", smoke=True).adapter == expected


def test_a_source_of_a_smoke_section_is_replaced_whole(load):
    found = load("inherits: parent.yaml\nsmoke: {data: {train: {hub: T, split: test}}}\n", smoke=True).data
    assert (found.train, found.validation) == ({"hub": "T", "split": "test"}, 8)


def test_a_recipe_without_smoke(load, refused):
    for text in (BASE, BASE + "smoke: null\n", "inherits: parent.yaml\nsmoke: null\n"):
        assert load(text).model == "m"
        refused(r"recipe\.yaml: it has no section smoke\. Run it without --smoke", text, smoke=True)
    assert load(BASE + "smoke: {}\n", smoke=True) == load(BASE)
    for section in ("small", "[small]", "3"):
        refused("smoke=.*: expected a mapping", BASE + f"smoke: {section}\n", smoke=True)


# References


def test_references(load, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORPEFT_TEST", "folder")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights/__init__.py").touch()
    text = """
        inherits: parent.yaml
        model: ${package:some_weights}/model
        task: mrpc
        values: {rows: {mrpc: 9}, folder: "${oc.env:TENSORPEFT_TEST,other}/x"}
        data: {train: "${values.folder}/${task}.tsv", train_rows: "${values.rows.${task}}"}
        output: ${oc.env:TENSORPEFT_MISSING,runs}/${adapter.method}
        description: \\${task}
    """
    found = load(text)
    assert found.model == str(tmp_path / "some_weights/model")
    assert (found.data.train, found.data.train_rows) == ("folder/x/mrpc.tsv", 9)
    assert (found.output, found.description) == ("runs/dota", "${task}")
    # An override is filled in together with the file.
    found = load(text, "task=rte", "adapter.method=lorta", "output=${task}-${adapter.method}")
    assert (found.data.train, found.data.train_rows, found.output) == ("folder/x/rte.tsv", 7, "rte-lorta")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("${package:no_such_package}", "the recipe needs the package no_such_package.*pip install"),
        ("${package:no_such_package.part}", "the recipe needs the package no_such_package.part.*pip install"),
        ("${oc.env:TENSORPEFT_MISSING}", "'TENSORPEFT_MISSING' not found"),
        ("${values.none}", "'values.none' not found"),
        ("${values.rows.${task}}", "'values.rows.cola' not found"),
        ("${unknown:x}", "Unsupported interpolation type unknown"),
        ("${task", "no viable alternative.*full_key: model"),
    ],
)
def test_references_to_nothing(refused, reference, message):
    refused(rf"recipe\.yaml: .*{message}", f"inherits: parent.yaml\ntask: cola\nmodel: '{reference}'\n")


# Overrides


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        (["trainer.learning_rate=5e-4"], "trainer", {"learning_rate": 5e-4, "warmup_steps": 10}),
        (
            ["trainer.a=1", "trainer.a=2", "trainer.warmup_steps=null"],
            "trainer",
            {"learning_rate": 1e-3, "warmup_steps": None, "a": 2},
        ),
        (["trainer={a: 1}"], "trainer", {"learning_rate": 1e-3, "warmup_steps": 10, "a": 1}),
        (["seeds=[1,2]"], "seeds", (1, 2)),
        (["seeds=4"], "seeds", (4,)),
        (['description="a=b, c: ${task}"'], "description", "a=b, c: rte"),
        (["output="], "output", "runs/train"),
        (["adapter="], "adapter", None),
        (["adapter.r=8"], "adapter", {**DOTA, "r": 8}),
        (["adapter.r=8", "adapter.method=lora"], "adapter", {"method": "lora", "r": 8}),
        (["adapter.method=lora", "adapter.r=8"], "adapter", {"method": "lora", "r": 8}),
        (["adapter.method=${values.method}", "adapter.r=8"], "adapter", {"method": "lora", "r": 8}),
        (["adapter=${values.small}"], "adapter", {"method": "lora", "r": 2}),
        (["adapter.target_modules=[q,v]"], "adapter", {**DOTA, "target_modules": ["q", "v"]}),
        (["adapter.target_modules=.*\\.(query|key)"], "adapter", {**DOTA, "target_modules": ".*\\.(query|key)"}),
    ],
)
def test_overrides(load, overrides, section, expected):
    assert getattr(load("inherits: parent.yaml\n", *overrides), section) == expected


@pytest.mark.parametrize(
    ("override", "part", "expected"),
    [
        ("data.train.split=test", "train", {"hub": "A", "name": "x", "split": "test"}),
        ("data.train={hub: C, split: test}", "train", {"hub": "C", "split": "test"}),
        ("data={train: {hub: C, split: test}}", "train", {"hub": "C", "split": "test"}),
        ("data.train=c.tsv", "train", "c.tsv"),
        ("data.train=[c.tsv,d.tsv]", "train", ["c.tsv", "d.tsv"]),
        ("data.test.rte=c.tsv", "test", {"rte": "c.tsv", "mrpc": {"hub": "B", "name": "y", "split": "test"}}),
        ("data.test.mrpc={hub: C}", "test", {"rte": "a.tsv", "mrpc": {"hub": "C"}}),
        ("data.test.mrpc.split=dev", "test", {"rte": "a.tsv", "mrpc": {"hub": "B", "name": "y", "split": "dev"}}),
        ("data.test={mrpc: c.tsv}", "test", {"mrpc": "c.tsv"}),
    ],
)
def test_an_override_of_a_source_or_within_one(load, override, part, expected):
    before = load("inherits: parent.yaml\n").data
    assert load("inherits: parent.yaml\n", override).data == replace(before, **{part: expected})


def test_overrides_are_on_top_of_smoke(load):
    found = load("inherits: parent.yaml\n", "data.validation=3", "adapter.method=lora", smoke=True)
    assert (found.data.validation, found.adapter) == (3, {"method": "lora"})


@pytest.mark.parametrize("override", ["adapter", "seeds", "data.test", "=x", "", "seeds[0]=3", "data.train[0]=x"])
def test_what_is_no_override(refused, override):
    refused(r"^'.*': expected KEY=VALUE, such as trainer\.learning_rate=1e-3; a list is given whole", BASE, override)


def test_an_override_that_is_not_yaml(refused):
    refused(r"^'adapter\.target_modules=\[q': the value is not YAML", BASE, "seeds=3", "adapter.target_modules=[q")


@pytest.mark.parametrize(
    ("task", "rewards", "unit"),
    [
        ("rte", None, "nats"),
        ("stsb", None, "squared error"),
        ("gsm8k", None, "nats"),
        ("gsm8k", {"answer": 1}, "minus the reward"),
        ("preferences", None, "nats"),
        ("folding", None, "structure loss"),
    ],
)
def test_the_loss_is_called_what_the_task_s_is(task, rewards, unit):
    pytest.importorskip("sklearn")
    assert Recipe("m", task, DataRecipe("a", "b"), rewards=rewards).loss_unit == unit


# To YAML and back


def test_the_yaml_of_a_recipe_is_the_recipe(load):
    for smoke in (False, True):
        found = load(
            "inherits: parent.yaml\nmax_step_kl: 0.01\nhead_learning_rate: 1e-5\n"
            "head: {target_modules: [dense], r: 3}\nseeds: [3, 1]\n",
            smoke=smoke,
        )
        assert load(found.to_yaml()) == found
    assert load(Recipe("m", "rte", DataRecipe("a", "b")).to_yaml()) == Recipe("m", "rte", DataRecipe("a", "b"))


def test_any_text_survives_the_yaml(load):
    words = [
        "${",
        "\\",
        "}",
        "$",
        "${task}",
        "${oc.env:HOME}",
        ": ",
        "'",
        '"',
        "\n",
        "#",
        "- ",
        "no",
        "1e-3",
        "null",
        "~",
    ]
    words += ["[", "{", "%", "@", "|", ">", "&", "*", "!", "\t", "0x1", "12:30", "=", "<<", "é", "\u2028", "\x07", "😀"]
    generator = random.Random(0)
    for _ in range(60):
        texts = ["".join(generator.choices(words, k=generator.randint(1, 5))) for _ in range(6)]
        data = DataRecipe(train=[texts[0], {"hub": texts[1]}], validation="b", test={"rte": texts[1]})
        adapter = {"method": texts[2], texts[3]: [texts[3], 1e-30, True, 10**20], "x": {"y": None}}
        recipe = Recipe("m" + texts[4], "rte", data, adapter, description=texts[5], trainer={"a": 1e22, "b": texts[0]})
        assert load(recipe.to_yaml()) == recipe


def test_paths_and_tuples_are_written_as_text_and_lists(load, tmp_path):
    recipe = Recipe("m", "rte", DataRecipe(tmp_path, "b"), {"method": "lora", "target_modules": ("q", "v")})
    found = load(recipe.to_yaml())
    assert (found.data.train, found.adapter) == (str(tmp_path), {"method": "lora", "target_modules": ["q", "v"]})
