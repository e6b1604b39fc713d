"""A recipe is a file, or the name of one that comes with the package."""

import pytest

pytest.importorskip("omegaconf")
from tensorpeft.recipes import FOLDER, find_recipe, list_names
from tensorpeft.training.recipe import load_comparison, load_recipe
from tensorpeft_cli import main

PACKAGED = "dota/ablation_random"
MINE = "model: m\ntask: rte\ndata: {train: a.tsv, validation: b.tsv}\ncompare: {seeds: 7}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, which is the working one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", list_names())
def test_a_packaged_recipe_is_found_by_its_name(name):
    assert find_recipe(name) == find_recipe(f"{name}.yaml") == FOLDER / f"{name}.yaml"


def test_a_packaged_recipe_is_loaded_by_its_name():
    assert load_recipe(PACKAGED) == load_recipe(FOLDER / f"{PACKAGED}.yaml")
    assert load_comparison("studies/bonds") == load_comparison(FOLDER / "studies/bonds.yaml") != {}


@pytest.mark.parametrize("name", [name for name in list_names() if not name.startswith("accelerate/")])
def test_the_printed_text_of_a_packaged_recipe_is_that_recipe_anywhere(name, folder, capsys):
    assert main(["recipes", name]) == 0
    (folder / "mine.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe("mine.yaml") == load_recipe(name)
    assert load_comparison("mine.yaml") == load_comparison(name)


def test_a_file_comes_before_the_package(folder):
    (folder / "dota").mkdir()
    (folder / f"{PACKAGED}.yaml").write_text(MINE)
    assert load_recipe(f"{PACKAGED}.yaml").model == "m"
    assert load_comparison(f"{PACKAGED}.yaml") == {"seeds": 7}
    assert load_recipe(PACKAGED).model != "m"  # no such file: the name of the packaged one


@pytest.mark.parametrize("parent", [PACKAGED, f"{PACKAGED}.yaml"])
def test_a_packaged_recipe_can_be_inherited(folder, parent):
    (folder / "mine.yaml").write_text(f"inherits: {parent}\nadapter: {{r: 3}}\n")
    packaged, mine = load_recipe(PACKAGED), load_recipe("mine.yaml")
    assert mine.adapter == {**(packaged.adapter or {}), "r": 3}
    assert mine.data == packaged.data


def test_a_file_beside_comes_before_the_package(folder):
    (folder / "mine").mkdir()
    (folder / "mine/demo.yaml").write_text(MINE)
    (folder / "mine/heir.yaml").write_text("inherits: demo.yaml\ntask: cola\n")
    assert load_recipe("mine/heir.yaml").model == "m"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dota/comonsense_llama2_7b", "dota/commonsense_llama2_7b"),
        ("stories_sft", "small/stories_sft"),
        ("lora/alpaca.yaml", "lorta/alpaca"),
        ("demmo", "demo"),
    ],
)
def test_a_name_that_is_wrong_is_answered_with_those_that_are_near(name, near):
    with pytest.raises(FileNotFoundError, match=rf"no recipe {name}: .*Did you mean .*{near}"):
        load_recipe(name)


def test_a_name_that_is_like_no_other_is_answered_with_where_to_look():
    with pytest.raises(FileNotFoundError) as raised:
        load_recipe("x/y/z.yaml")
    assert "Did you mean" not in str(raised.value)
    assert "tensorpeft recipes" in str(raised.value)
