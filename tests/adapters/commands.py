"""Running a command as a user does, in this process."""

from click.testing import Result
from typer.testing import CliRunner

from loramerge.cli.app import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def done(*arguments: object) -> str:
    """What a command prints that ends well."""
    result = run(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.output)
