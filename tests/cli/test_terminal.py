"""Names from outside on the terminal: neither rich nor the terminal takes them for more than text."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ntkdask.cli import commands as cli
from ntkdask.cli import console, terminal
from ntkdask.cli.doctor import Finding
from ntkdask.datasets import open_dataset, write_dataset
from ntkdask.execution.progress import Record
from ntkdask.wording import printable

HOSTILE = [
    "[/red]",
    "[bold]b[/bold]",
    ":smile:",
    "a\x1b[31mb",
    "\u202ex",
    "\x9b2J",
    "bell\x07",
    "two\nlines",
    "[link=x]y",
]


def shown(name: str) -> str:
    return printable(name)


def call(*arguments: str) -> str:
    found = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "300"})
    assert found.exit_code == 0, found.output
    return found.output


def test_printable() -> None:
    assert [printable(c) for c in "\x00\x1b\x7f\x85\x9b\u202e\u2028\ud800"] == [
        *("\\x00", "\\x1b", "\\x7f", "\\x85", "\\x9b", "\\u202e", "\\u2028", "\\ud800")
    ]
    assert printable("naïve 猫 [x] € 👩\u200d🔬") == "naïve 猫 [x] € 👩\u200d🔬"
    assert printable("a\nb\r", lines=True) == "a\nb\\r"


@pytest.mark.parametrize("name", HOSTILE)
def test_info_and_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Folders, classes and stages."""
    monkeypatch.chdir(tmp_path)
    folder = name.replace("/", "∕")
    write_dataset(folder, np.arange(8.0).reshape(4, 2), np.array([name, "other"] * 2))
    answer = call("data", "info", folder)
    assert f"{shown(folder)} (all)" in answer
    assert f"{shown(name)}, other" in answer or f"other, {shown(name)}" in answer
    Record.open(tmp_path / folder / "run", {}).put(name, 1)
    assert re.search(rf"{re.escape(shown(name))} +│ 1/1", call("status", f"{folder}/run"))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", answer)


@pytest.mark.parametrize("name", HOSTILE)
def test_bars_plans_and_findings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with console.console.capture() as out:
        with console.progress_bars() as progress:
            bars = console.Bars(progress)
            bars.stage(name, 2, 1)
            progress.refresh()
        console.console.print(terminal.facts(name, {name: name}))
        console.console.print(shown(f"report: {name}"))
    assert out.get().count(shown(name)) >= 5
    monkeypatch.setattr("ntkdask.cli.doctor.diagnose", lambda folder: [Finding(name, True, name, name)])
    answer = call("doctor")
    assert answer.count(shown(name)) == 3
    assert " ok " in answer


@pytest.mark.parametrize("name", HOSTILE)
def test_errors_and_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ntkdask", "data", "info", f"x{name}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert f"x{printable(name, lines=True)}" in capfd.readouterr().err
    monkeypatch.setattr("ntkdask.jobs.inspect.verify", lambda *_: [name])
    found = CliRunner().invoke(cli.app, ["verify", "x"])
    assert f"damaged: {printable(name, lines=True)}\n" in found.output


def test_file_names_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in another encoding: Python cannot print it as it is."""
    monkeypatch.chdir(tmp_path)
    source = os.fsdecode(b"caf\xe9.csv")
    Path(source).write_text("a,b\n1,2.5\n2,3.5\n")
    url = os.fsdecode(b"d\xe9")
    assert "d\\udce9" in call("data", "import", source, url)
    assert open_dataset(url).n == 2
    assert "d\\udce9 (all)" in call("data", "info", url)
