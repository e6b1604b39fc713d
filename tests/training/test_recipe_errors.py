"""What `load_recipe` refuses, with the file's name and what to do."""

import pytest

pytest.importorskip("omegaconf")
from tensorpeft.training.recipe import load_recipe

BASE = "model: m\ntask: rte\ndata: {train: a.tsv, validation: b.tsv}\n"


@pytest.fixture
def refused(tmp_path):
    """Writes "recipe", and other files by name, and expects an error with a message."""

    def run(message, text, **files):
        for name, content in {"recipe": text, **files}.items():
            (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"(?s){message}"):
            load_recipe(tmp_path / "recipe.yaml")

    return run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("modle: m", r"unknown key 'modle'\. Did you mean model\?"),
        ("trainer_arguments: {}", r"unknown key 'trainer_arguments'\. Did you mean"),
        ("xyz: 1", r"unknown key 'xyz'\. Known are adapter, data,"),
        ("data.trian: a", r"data: unknown key 'trian'\. Did you mean train\?"),
        ("3: 4", "unknown key 3"),
        ("data: rows.tsv", "data='rows.tsv': expected a mapping of fields"),
        ("data: null", "data is missing"),
        ("model: ''", "model is missing"),
        ("task: null", "task is missing"),
        ("data.train: null", "data.train is missing: a file"),
        ("data.validation: []", "data.validation is missing"),
        ("model: 3", "model=3: expected a text"),
        ("task: [rte]", r"task=\['rte'\]: expected a text"),
        ("output: ' '", "output=' ': expected a text"),
        ("description: {a: b}", "description={'a': 'b'}: expected a text"),
        ("adapter: {r: 8}", "adapter={'r': 8}: expected a field method"),
        ("head_learning_rate: fast", "head_learning_rate='fast': expected a number"),
        ("head_learning_rate: yes", "head_learning_rate=True: expected a number"),
        ("head_learning_rate: -1e-3", "head_learning_rate=-0.001: expected a number above 0"),
        ("head_learning_rate: .nan", "head_learning_rate=nan: expected a number above 0"),
        ("max_step_kl: .inf", "max_step_kl=inf: expected nats above 0"),
        ("max_step_kl: small", "max_step_kl='small': expected nats above 0"),
        ("max_step_kl: 0", "max_step_kl=0: expected nats above 0"),
        ("max_step_kl: yes", "max_step_kl=True: expected nats above 0"),
        ("data.loss_on: prompt", "data.loss_on='prompt': expected text or response"),
        ("data.validation: -5", "data.validation=-5: expected a source, or a number of rows, at least 1"),
        ("data.validation: 0", "data.validation=0: expected a source"),
        ("data.validation: yes", "data.validation=True: expected a source"),
        ("data.seed: a", "data.seed='a': expected a whole number"),
        ("data.chat: maybe", "data.chat='maybe': expected true or false"),
        ("data.seed: true", "data.seed=True: expected a whole number"),
        ("head: {r: 3}", r"head\.target_modules=None: expected a list of names"),
        ("head: {target_modules: dense}", r"head\.target_modules='dense': expected a list of names"),
        ("head: {target_modules: [dense], rank: 3}", r"head: unknown key 'rank'\."),
        ("head: {target_modules: [dense], r: 0}", r"head\.r=0: expected a whole number, at least 1"),
        ("head: {target_modules: [dense], alpha: 0}", r"head\.alpha=0: expected a number above 0"),
        ("head: {target_modules: [dense], tt_rank: 0}", r"head\.tt_rank=0: expected a whole number, at least 1"),
        ("head: {target_modules: [dense], tt_rank: 5, r: 2}", r"head: r=2, alpha=None and tt_rank=5: .* Take out r"),
        ("head: {target_modules: [dense], train_others: 1}", r"head\.train_others=1: expected true or false"),
    ],
)
def test_a_wrong_recipe(refused, line, message):
    key, _, value = line.partition(": ")
    text = f"inherits: base.yaml\ndata: {{{key.removeprefix('data.')}: {value}}}\n" if "." in key else None
    refused(rf"recipe\.yaml: {message}", text or f"inherits: base.yaml\n{line}\n", base=BASE)


@pytest.mark.parametrize(
    "seeds", ["a", "[]", "[0, 0]", "[0, 1.5]", "[true]", "1.5", "'12'", "[[1]]", "{a: 1}", "-1", "4294967296"]
)
def test_wrong_seeds(refused, seeds):
    refused(r"recipe\.yaml: seeds=\[.*\]: expected a list of different whole numbers", BASE + f"seeds: {seeds}\n")


@pytest.mark.parametrize("name", ["train_rows", "validation_rows", "test_rows", "max_length"])
@pytest.mark.parametrize("value", ["0", "-5", "true", "1e2", "'8'"])
def test_wrong_numbers_of_rows(refused, name, value):
    text = BASE.replace("}", f", {name}: {value}}}")
    refused(rf"recipe\.yaml: data\.{name}=.*: expected a whole number, at least 1, or null", text)


@pytest.mark.parametrize("section", ["data", "trainer", "adapter", "quantize", "evaluate", "model_arguments"])
@pytest.mark.parametrize("value", ["lora", "3", "true", "no", "[1]"])
def test_a_section_that_is_no_mapping(refused, section, value):
    text = BASE if section != "data" else "model: m\ntask: rte\n"
    refused(rf"recipe\.yaml: {section}=.*: expected a mapping of fields", f"{text}{section}: {value}\n")


def test_rows_for_validation_are_drawn_or_taken_but_not_both(refused):
    text = BASE.replace("b.tsv", "100, validation_rows: 50")
    refused(r"data\.validation_rows=50: data\.validation=100 says how many rows are drawn already", text)


@pytest.mark.parametrize("section", ["trainer: [1]", "adapter: [1]", "data: [1]", "evaluate: [1]"])
def test_a_list_where_the_file_below_has_a_mapping(refused, section):
    below = BASE + "trainer: {a: 1}\nadapter: {method: lora}\nevaluate: {a: 1}\n"
    refused(r"\[1\].*mapping", f"inherits: base.yaml\n{section}\n", base=below)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not YAML"),
        ("model: m\nmodel: n\n", "not YAML.*duplicate key model"),
        ("- model\n", "expected a mapping with model, task and data"),
        ("3\n", "not YAML"),
        ("", "model is missing"),
        (BASE.replace("m\n", "???\n"), "Missing mandatory value: model"),
    ],
)
def test_what_is_no_recipe(refused, text, message):
    refused(rf"recipe\.yaml: {message}", text)


def test_bytes_that_are_no_text_and_a_missing_file(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not YAML: 'utf-8'"):
        load_recipe(tmp_path / "recipe.yaml")
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(FileNotFoundError, match=r"no recipe .*\. Pass the path of a YAML file"):
            load_recipe(path)
