"""What is compared, read from a recipe: entries, their adapters and their grids. No model is loaded."""

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from tensorpeft.studies.catalogue import DEFAULT_COMPARED, METHODS
from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.studies.compare.table import legend
from tensorpeft.studies.rates import rate_grid, rates_beyond

RECIPE = """
model: some/model
task: sst2
adapter: {method: dota, r: 32, num_cores: 4, target_modules: [q, v]}
data: {train: train.tsv, validation: 10}
trainer: {learning_rate: 1e-3, max_steps: 5}
"""


@pytest.fixture
def write(tmp_path):
    def write(compare: str = "", recipe: str = RECIPE):
        path = tmp_path / "some.yaml"
        path.write_text(recipe + compare, encoding="utf-8")
        return path

    return write


def adapters(comparison):
    return {entry.key: entry.recipe.adapter for entry in comparison.entries}


def test_without_a_section_the_default_methods_stand_beside_the_recipes_own(write):
    comparison = load_entries(write())
    assert tuple(entry.key for entry in comparison.entries) == DEFAULT_COMPARED
    assert comparison.seeds == 3
    assert str(comparison.output) == "runs/compare/some"
    found = adapters(comparison)
    assert found["full"] is None
    assert found["dota"] == comparison.recipe.adapter
    assert found["dota-random"] == {**comparison.recipe.adapter, "init_weights": "random"}
    assert found["lora"] == {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]}
    assert found["lorta"] == {"method": "lorta", "r": 16, "target_modules": ["q", "v"]}


def test_grids_follow_the_recipes_rate_and_what_a_method_wants_of_it(write):
    rates = {entry.key: entry.rates for entry in load_entries(write()).entries}
    assert rates["dota"] == rates["lora"] == (3e-4, 1e-3, 3e-3)
    assert rates["lorta"] == (3e-3, 1e-2, 3e-2)
    # The same rate under another method's adapter is another method's: LoRTA wants ten times LoRA's.
    of_lorta = RECIPE.replace("method: dota, r: 32, num_cores: 4", "method: lorta, r: 4")
    rates = {entry.key: entry.rates for entry in load_entries(write(recipe=of_lorta)).entries}
    assert rates["lorta"] == (3e-4, 1e-3, 3e-3)
    assert rates["lora"] == (3e-5, 1e-4, 3e-4)
    scaled = load_entries(write("compare: {rate_scale: 0.1}"), "dota").entries[0]
    assert scaled.rates == (3e-5, 1e-4, 3e-4)


def test_one_rate_is_all_that_a_method_needs_as_its_steps_are_bounded(write):
    of_questions = RECIPE.replace("task: sst2", "task: gsm8k")
    entries = {entry.key: entry for entry in load_entries(write(recipe=of_questions)).entries}
    assert entries["dota"].rates == entries["lora"].rates == (1e-2,)
    assert entries["lorta"].rates == (1e-1,)
    assert entries["lora"].recipe.max_step_kl == 0.01
    # A copy of all weights would be needed.
    assert (entries["full"].rates, entries["full"].recipe.max_step_kl) == ((1e-5, 3e-5, 1e-4), None)

    def lora(section: str, recipe: str = of_questions):
        (entry,) = load_entries(write(section, recipe=recipe), "lora").entries
        return entry.rates, entry.recipe.max_step_kl

    grid = (3e-4, 1e-3, 3e-3)
    assert lora("compare: {max_step_kl: 0.05}") == ((1e-2,), 0.05)
    assert lora("compare: {methods: {lora: {max_step_kl: 0.05}}}") == ((1e-2,), 0.05)
    assert lora("max_step_kl: 0.05") == ((1e-2,), 0.05)
    assert lora("compare: {max_step_kl: null}") == (grid, None)
    assert lora("compare: {methods: {lora: {max_step_kl: null}}}") == (grid, None)
    assert lora("max_step_kl: 0.05\ncompare: {methods: {lora: {max_step_kl: null}}}") == (grid, None)
    assert lora("max_step_kl: 0.05\ncompare: {max_step_kl: null}") == (grid, 0.05)
    # Rates that are named are tried as they are.
    assert lora("compare: {methods: {lora: {rates: [1e-3, 1e-2]}}}") == ((1e-3, 1e-2), None)
    assert lora("max_step_kl: 0.05\ncompare: {methods: {lora: {rates: [1e-3, 1e-2]}}}") == ((1e-3, 1e-2), 0.05)
    # A head that starts from noise hides what becomes of the model, and shards cannot be shortened.
    assert lora("", RECIPE) == (grid, None)
    assert lora("max_step_kl: 0.05", RECIPE) == (grid, 0.05)
    assert lora("", of_questions.replace("max_steps: 5", "max_steps: 5, fsdp: true")) == (grid, None)
    with pytest.raises(ValueError, match=r"compare.max_step_kl=-1: expected nats above 0"):
        lora("compare: {max_step_kl: -1}")
    # Without a rate: that of `tensorpeft train` without one, for all; what is searched must have one.
    without = of_questions.replace("learning_rate: 1e-3, ", "")
    assert [entry.rates for entry in load_entries(write(recipe=without), "dota,lorta,lora").entries] == [(0.1,)] * 3
    assert lora("", without) == ((1e-1,), 0.01)
    assert lora("compare: {max_step_kl: 0.05}", without) == ((1e-1,), 0.05)
    labels = RECIPE.replace("learning_rate: 1e-3, ", "")
    assert lora("compare: {methods: {lora: {rates: [1e-3]}}}", labels) == ((1e-3,), None)
    for section, recipe in (
        ("compare: {max_step_kl: null}", without),
        ("compare: {methods: {lora: {max_step_kl: null}}}", without),
        ("", without.replace("gsm8k", "preferences")),
        ("", labels),
    ):
        with pytest.raises(ValueError, match=r"learning_rate=None: .* compare\.methods\.lora\.rates"):
            lora(section, recipe)
    with pytest.raises(ValueError, match=r"learning_rate=None: .* for the rates of full to begin from"):
        load_entries(write(recipe=without), "dota,full")
    # Where no methods are named either, all weights, whose rate nothing tells, are left out, and the table says so.
    by_default = load_entries(write(recipe=without))
    assert [entry.key for entry in by_default.entries] == ["lora", "dota", "dota-random", "lorta", "lotr"]
    assert any("Full fine-tuning is left out" in line for line in legend(by_default, []))
    assert not load_entries(write(recipe=of_questions)).note


def test_a_variant_is_a_part_of_a_recipe_put_on_top(write):
    section = """
compare:
  seeds: 2
  methods:
    small: {label: DoTA R=4, adapter: {r: 4}}
    slow: {trainer: {lr_scheduler_type: constant}, rates: [1e-3, 1e-4]}
    lora: {adapter: {r: 2}, rates: [3e-3]}
"""
    comparison = load_entries(write(section))
    small, slow, lora = comparison.entries
    assert comparison.seeds == 2
    assert small.recipe.adapter == {**comparison.recipe.adapter, "r": 4}
    assert (small.label, small.knob) == ("DoTA R=4", "r")
    assert slow.recipe.trainer == {**comparison.recipe.trainer, "lr_scheduler_type": "constant"}
    assert slow.rates == (1e-4, 1e-3)
    assert lora.rates == (3e-3,)
    assert lora.recipe.adapter["r"] == 2
    assert lora.label == "LoRA r=2"
    assert [entry.key for entry in load_entries(write(section), "dora,slow").entries] == ["dora", "slow"]


def test_a_method_of_the_catalogue_is_no_variant_of_it_though_the_recipe_has_one(write):
    random = RECIPE.replace("num_cores: 4", "num_cores: 4, init_weights: random")
    dota, drawn = load_entries(write(recipe=random), "dota,dota-random").entries
    assert "init_weights" not in dota.recipe.adapter
    assert drawn.recipe.adapter == {**dota.recipe.adapter, "init_weights": "random"}
    assert dota.recipe.adapter["num_cores"] == 4
    pissa = RECIPE.replace("method: dota, r: 32, num_cores: 4", "method: lora, r: 16, init_lora_weights: pissa")
    in_4_bits = f"{pissa}quantize: {{rounds: 1, skip_modules: [k]}}\n"
    lora, dora, own, full = load_entries(write(recipe=in_4_bits), "lora,dora,pissa,full").entries
    assert lora.recipe.adapter == {"method": "lora", "r": 16, "lora_alpha": 16, "target_modules": ["q", "v"]}
    assert dora.recipe.adapter == {**lora.recipe.adapter, "use_dora": True}
    assert own.recipe.adapter["init_lora_weights"] == "pissa"
    # Of weights in 4 bits only PiSSA's lack a start; where all are trained they are in full.
    assert own.recipe.quantize == {"rounds": 1, "skip_modules": ["k"]}
    assert lora.recipe.quantize == dora.recipe.quantize == {"residual": False, "skip_modules": ["k"]}
    assert full.recipe.quantize is None
    # What makes it no other method of the catalogue is the recipe's adapter as it is.
    (balanced,) = load_entries(write(recipe=random.replace("random", "balanced")), "dota").entries
    assert balanced.recipe.adapter["init_weights"] == "balanced"
    # An entry that is the recipe's, under a name of its own, is it.
    (mine,) = load_entries(write("compare: {methods: {mine: {adapter: {r: 4}}}}", random)).entries
    assert mine.recipe.adapter["init_weights"] == "random"


def test_a_trial_has_a_folder_of_its_own(write):
    def output(section, smoke=True, **arguments):
        trial = "smoke: {trainer: {max_steps: 1}}\n"
        return str(load_entries(write(trial + section), "lora", smoke=smoke, **arguments).output)

    assert output("compare: {output: runs/mine}", smoke=False) == "runs/mine"
    assert output("compare: {output: runs/mine}") == "runs/mine-smoke"
    assert output("") == "runs/compare/some-smoke"
    assert output("compare: {output: runs/mine}", overrides=["compare.output=there"]) == "there"
    path = write("output: '${compare.output}/train'\nsmoke: {}\ncompare: {output: a}")
    assert load_entries(path, smoke=True).recipe.output == "a-smoke/train"


def test_overrides_are_of_the_recipe_and_reach_every_entry(write):
    comparison = load_entries(write(), "lora,dota", overrides=["trainer.max_steps=7", "adapter.target_modules=[k]"])
    for entry in comparison.entries:
        assert entry.recipe.trainer["max_steps"] == 7
        assert entry.recipe.adapter["target_modules"] == ["k"]


def test_a_section_is_no_part_of_the_recipe_that_train_runs(write):
    assert "compare" not in load_entries(write("compare: {seeds: 2}")).recipe.to_yaml()


@pytest.mark.parametrize(
    ("section", "arguments", "message"),
    [
        ("", {"methods": "dota,lortaa"}, "unknown key .lortaa.. Did you mean lorta"),
        ("", {"methods": "dota,dota"}, "twice"),
        ("", {"seeds": 0}, "seeds=0"),
        ("", {"overrides": ["trainer.learning_rate=null"]}, "learning_rate=None"),
        ("compare: {methods: {mine: }}", {}, "mine is empty"),
        ("compare: {methods: {mine: {rank: 3}}}", {}, "unknown key 'rank'"),
        ("compare: {methods: {mine: {rates: [1e-3, 0]}}}", {}, "numbers above 0"),
        ("compare: {methods: {mine: {rates: 1e-3}}}", {}, "a list of numbers"),
        ("compare: {methods: {mine: 3}}", {}, "expected a mapping"),
        ("compare: {methods: [dota]}", {}, "expected a mapping"),
        ("compare: {methods: {../../x: {rates: [1e-3]}}}", {}, r"methods\.\.\./\.\./x: expected a name of letters"),
        ("compare: {methods: {.: {rates: [1e-3]}}}", {}, "expected a name of letters"),
        ("compare: {methods: {dota: {adapter: lora}}}", {}, "adapter='lora': expected a mapping"),
        ("compare: {sedes: 3}", {}, "Did you mean seeds"),
        ("compare: {budget: many}", {}, "expected a number of parameters"),
        ("compare: {target_loss: low}", {}, "target_loss='low': expected a number"),
        ("compare: {rate_scale: null}", {}, "rate_scale=None: expected a number above 0"),
        ("compare: {rate_scale: 0}", {}, "rate_scale=0: expected"),
        ("compare: {rate_scale: [1]}", {}, r"rate_scale=\[1\]: expected"),
        ("compare: {output: 5}", {}, "output=5: expected a folder"),
        ("compare: {methods: {lora: {rates: [.inf]}}}", {}, "numbers above 0"),
        ("compare: {methods: {lora: {trainer: {learning_rate: 0.5}}}}", {}, "an entry says this with rates"),
        ("compare: {methods: {full: {quantize: {rounds: 1}}}}", {}, "full.quantize: all weights are trained"),
        ("compare: 3", {}, "expected a mapping"),
    ],
)
def test_what_is_wrong_is_named(write, section, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_entries(write(section), **arguments)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_every_method_of_the_catalogue_has_a_configuration_with_its_knobs(method):
    from tensorpeft.training.adapters import make_config

    if method.adapter is None:
        assert method.knob is method.rank is None
        return
    config = make_config({**method.adapter, "target_modules": ["q"]}, "SEQ_CLS")
    for field in {method.knob, method.rank} - {None}:
        assert hasattr(config, field)
    if method.is_planned and method.rank is None and method.knob is not None:
        assert method.knob in method.adapter  # what a plan says without a budget


def test_every_method_of_ours_is_in_the_catalogue():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    ours = {
        str(name.value).lower()
        for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if config.__module__.startswith("tensorpeft.methods.")
    }
    assert ours <= {method.adapter_method for method in METHODS if method.is_planned}


def test_one_rate_is_no_choice(write):
    (entry,) = load_entries(write("compare: {methods: {lora: {rates: [2e-3]}}}")).entries
    assert entry.rates == (2e-3,)


def test_what_is_done_to_the_base_is_the_methods_or_the_recipes(write):
    qlora, qdota, dota = load_entries(write(), "qlora,qdota,dota").entries
    assert qlora.recipe.quantize == {"residual": False}
    assert qdota.recipe.quantize == {"rounds": 5}
    assert "4 bits" in qdota.note
    assert dota.recipe.quantize is None
    section = "compare: {methods: {qdota: {quantize: {rounds: 2}}, qlora: {quantize: {skip_modules: [k]}}}}"
    qdota, qlora = load_entries(write(section)).entries
    assert qdota.recipe.quantize == {"rounds": 2}
    assert qlora.recipe.quantize == {"residual": False, "skip_modules": ["k"]}
    (full,) = load_entries(write("compare: {methods: {qdota: {quantize: null}}}")).entries
    assert full.recipe.quantize is None


def test_a_base_without_a_start_and_its_rounds_are_told_apart_from_the_recipes(write):
    plain = f"{RECIPE}quantize: {{residual: false, double_quant: false}}\n"
    section = "compare: {methods: {qdota: , dota: , mine: {adapter: {r: 4}, quantize: {rounds: 2}}}}"
    qdota, dota, mine = load_entries(write(section, plain)).entries
    assert qdota.recipe.quantize == {"residual": True, "rounds": 5, "double_quant": False}
    assert dota.recipe.quantize == {"residual": False, "double_quant": False}
    assert mine.recipe.quantize == {"residual": True, "rounds": 2, "double_quant": False}
    in_rounds = f"{RECIPE}quantize: {{rounds: 3}}\n"
    bases = {e.key: e.recipe.quantize for e in load_entries(write(recipe=in_rounds), "dota,pissa,lora,qlora").entries}
    assert bases == {"dota": {"rounds": 3}, "pissa": {}, "lora": {"residual": False}, "qlora": {"residual": False}}
    # Of the recipe's own adapter they stay, to be refused when it is made.
    pissa = RECIPE.replace("method: dota, r: 32, num_cores: 4", "method: lora, r: 16, init_lora_weights: pissa")
    (own,) = load_entries(write(recipe=f"{pissa}quantize: {{rounds: 3}}\n"), "pissa").entries
    assert own.recipe.quantize == {"rounds": 3}


def test_a_method_with_places_of_its_own_does_not_take_the_recipes_layers(write):
    recipe = RECIPE.replace("target_modules: [q, v]", "target_modules: [q, v], modules_to_save: [head]")
    (entry,) = load_entries(write(recipe=recipe), "loretta-adapter").entries
    assert entry.recipe.adapter == {"method": "lorettaadapter", "tt_rank": 5, "modules_to_save": ["head"]}


def test_rates():
    assert rate_grid(0.0028) == (0.001, 0.003, 0.01)
    assert rate_grid(1e-4, 1) == (1e-4,)
    assert rates_beyond([0.001, 0.003, 0.01], best=0.001) == [0.0003]
