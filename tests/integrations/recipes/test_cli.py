"""Values of the command: nothing is imported that one of them names, and what YAML takes for a number is said."""

import json
import subprocess
import sys

import pytest
import yaml

from geomreg.integrations.recipes.cli import main

GIVEN = ["finetune", "--model.name", "emojiclip", "--target.kind", "csv", "--train.steps", "1", "--train.warmup_steps", "0"]
NAMED = {"class_path": "marking.Marked", "init_args": {"number": 2}}
PLACES = [
    {"target": NAMED},
    {"target": "marking.Marked"},
    {"model": NAMED},
    {"model": {"lora": NAMED}},
    {"model": {"lora": "marking.Marked"}},
    {"method": {"terms": {"one": NAMED}}},
    {"method": {"terms": {"one": "marking.Marked"}}},
    {"method": {"terms": {"one": {"term": "DiVE", "weight": 1.0, "options": NAMED}}}},
    {"method": {"terms": {"one": {"term": "DiVE", "weight": 1.0, "options": {"decay": NAMED}}}}},
    {"evaluation": {"one": NAMED}},
    {"evaluation": {"one": {"kind": "folder", "path": "x", "options": {"templates": [NAMED]}}}},
    {"texts": NAMED},
    {"probe": {"class_path": "marking.Marked"}},
    {"train": NAMED},
    {"monitor": NAMED},
    {"target": {"options": {"separator": NAMED}}},
    {"target": {"options": {"separator": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARK"]}}}}},
]


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that is there once the module was imported, or a command run."""
    (tmp_path / "modules").mkdir()
    text = f"open({str(tmp_path / 'MARK')!r}, 'w').close()\n\n\nclass Marked:\n    def __init__(self, number=1):\n        pass\n"
    (tmp_path / "modules" / "marking.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "MARK"
    sys.modules.pop("marking", None)


def ended(arguments, capsys):
    """Exit status, and the lines of the error but for warnings."""
    try:
        status = main(arguments)
    except SystemExit as error:  # of the parser
        status = error.code
    return status, [line for line in capsys.readouterr().err.splitlines() if not line.startswith("geomreg: warning")]


@pytest.mark.parametrize("content", PLACES, ids=json.dumps)
def test_no_value_imports_anything(content, mark, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    files = ["--target.path", "nowhere.csv", "--output", str(tmp_path / "run"), "--config", str(tmp_path / "own.yaml")]
    status, lines = ended([*GIVEN, *files], capsys)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("geomreg: ")
    assert not mark.exists()
    assert "marking" not in sys.modules
    if content in PLACES[:3]:
        assert lines[0].startswith("geomreg: expected the options of an entry, got 'marking.Marked'. Write them one by one: no value here")


def test_no_argument_imports_anything(mark, tmp_path, capsys):
    for more in (["--texts", "marking.Marked"], ["--texts.class_path", "marking.Marked"], ["--model", json.dumps(NAMED)]):
        status, lines = ended([*GIVEN, "--target.path", "nowhere.csv", "--output", str(tmp_path / "run"), *more], capsys)
        assert (status, len(lines)) == (2, 1)
        assert "no value here names a class or a module" in lines[0]
    assert ended(["ensemble", "--base", json.dumps(NAMED), "--finetuned", "x", "--output", "y"], capsys)[0] == 2
    assert not mark.exists()


def test_the_mark_is_one(mark):
    """Otherwise the tests above would find nothing."""
    subprocess.run([sys.executable, "-c", "import marking"], cwd=mark.parent / "modules", check=True)
    assert mark.exists()


@pytest.mark.parametrize(
    ("text", "name", "got"),
    [
        ("target: {path: 2024}", "target.path", "2024"),
        ("target: {path: 1_000}", "target.path", "1000"),
        ("target: {path: no}", "target.path", "False"),
        ("model: {name: 7}", "model.name", "7"),
        ("model: {name: emojiclip, pretrained: 7}", "model.pretrained", "7"),
        ("evaluation: {id: {kind: folder, path: 2024}}", "path", "2024"),
        ("texts: {kind: csv, path: 2024}", "path", "2024"),
        ("output: 2024", "output", "a value of type int"),
    ],
)
def test_what_yaml_takes_for_something_else(text, name, got, tmp_path, monkeypatch, capsys):
    """In quotes it is a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(text)
    status, lines = ended([*GIVEN, "--target.path", "x", "--output", "run", "--config", "own.yaml"], capsys)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"geomreg: expected {name} as text, got {got}, which is none in YAML. Put it in quotes.")


def test_numbers_as_names_of_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text('target: {path: "2024"}')
    for more in (["--config", "own.yaml"], ["--target.path", "2024"]):
        assert ended([*GIVEN, "--output", "2025", *more], capsys)[1] == [
            "geomreg: CsvPairs: expected a CSV or TSV file, got none at 2024. Check the path."
        ]
