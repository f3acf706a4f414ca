"""The command `lorauter keys new`: a fresh API key, and the row that stands for it in the file of keys."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml
from pydantic import ValidationError

from lorauter.errors import ConfigError
from lorauter.keys import ApiKey, hash_key, new_key
from lorauter_cli.console import App, notify

keys_app = App(no_args_is_help=True, help="API keys.")


@keys_app.callback()
def _group() -> None:
    """API keys."""


@keys_app.command("new")
def new(
    name: Annotated[str, typer.Option(help="Whose it is; logs show it.")],
    role: Annotated[list[str] | None, typer.Option(help="inference (the default) or admin; may be repeated.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A pattern of adapters that it may use, like 'team-a-*'; may be repeated.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="None is without limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Prompts and answers together.")] = None,
) -> None:
    """Make an API key: the key goes to stderr, once and for all, and its row for the file of keys to stdout.

    The row holds no secret: `lorauter keys new --name team-a >> keys.yaml`.
    """
    key = new_key()
    row = {
        "name": name,
        "sha256": hash_key(key),
        "roles": role or ["inference"],
        "adapters": adapter,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    row = {field: value for field, value in row.items() if value is not None}
    try:
        ApiKey.model_validate(row)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{problem['loc'][0]}: {problem['msg']}") from error
    typer.echo(yaml.safe_dump([row], sort_keys=False), nl=False)
    notify(f"the key, which nothing else keeps:\n{key}")
