"""The command line in this process, as a user gives it."""
from typer.testing import CliRunner

from dml_companion import cli


def run(*words, code=0):
    "A command as a user gives it; returns what it printed."
    result = CliRunner().invoke(cli.app, [str(w) for w in words], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit): raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def refused(*words):
    "The one sentence of a command that was given something wrong."
    text = run(*words, code=2)
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text
