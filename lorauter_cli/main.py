"""The command line. Parses arguments, shows progress, and turns errors into one line; the work is the library's.

`serve`, `batch` and `doctor` alone need Ray, and import it only then.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from lorauter.defaults import DEFAULT, check_changeable, resolve_catalog
from lorauter.errors import AdapterError, ConfigError, Conflict, InvalidRequest, LorauterError
from lorauter_cli.batch import batch
from lorauter_cli.catalog import catalog_app
from lorauter_cli.compose import compose
from lorauter_cli.console import App, console, counting, notify, phase, show_error, warn
from lorauter_cli.doctor import doctor
from lorauter_cli.eval import eval_app
from lorauter_cli.files import written
from lorauter_cli.keys import keys_app
from lorauter_cli.service import CONFIG_HELP, make_importable, shipped_config
from lorauter_cli.stores import (
    States,
    adapters_from,
    adapters_to_read,
    adapters_to_write,
    catalog_to_read,
    catalog_to_write,
)

app = App(
    no_args_is_help=True,
    add_completion=False,
    help="Routes queries to mixtures of LoRA adapters.",
    pretty_exceptions_enable=False,
)
adapters_app = App(no_args_is_help=True, help="Adapters in an object store.")
adapters_app.command("compose")(compose)
app.add_typer(adapters_app, name="adapters")
app.add_typer(catalog_app, name="catalog")
app.add_typer(eval_app, name="eval")
app.add_typer(keys_app, name="keys")
app.command()(batch)
app.command()(doctor)

_BATCH = 256
_DECIDED = ("tasks", "adapters", "confidence", "constrained", "shown", "by_states")

_Encoder = Annotated[str, typer.Option(help="Sentence encoder: a folder, an id, a store's URI, or 'default'.")]


def main() -> None:
    """Run the command line; an error is one line on stderr and exit status 1, wrong usage 2, and Ctrl-C 130."""
    try:
        app()
    except Exception as error:  # noqa: BLE001 (nobody wants a traceback)
        show_error(error)
        sys.exit(1)


@adapters_app.command("push")
def push(
    source: Annotated[
        str,
        typer.Argument(
            help="A PEFT adapter's folder, a folder of such folders, or another store: hf://owner/name@revision, ..."
        ),
    ],
    to: Annotated[str, typer.Option(help="The store: a folder, s3://bucket/prefix, gs://... or az://...")],
    catalog: Annotated[
        str | None, typer.Option(help="A catalog that is to serve them: all of them become one new version of it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Send again what the store seems to have.")] = False,
) -> None:
    """Validate adapters and publish them in a store, each under its folder's name."""
    repository = adapters_to_write(to)
    adapters = adapters_from(source)
    if not adapters:
        raise ConfigError(f"{source} holds no adapter: no adapter_config.json in it or one level below")
    if catalog is not None:
        from lorauter.catalog import Catalog, change_catalog, current_version, with_adapter

        catalog = catalog_to_write(catalog)
        if current_version(catalog) is None:
            raise ConfigError(f"there is no catalog at {catalog}; build it by 'lorauter catalog build'")
    refused, pushed = 0, []
    try:
        with counting(f"pushing {len(adapters)} adapters", "adapters are done") as progress:
            for done, adapter in enumerate(adapters, start=1):
                try:
                    with adapter as folder:
                        pushed.append(repository.push(folder, force=force, report=warn))
                except (AdapterError, Conflict) as error:
                    refused += 1
                    warn(f"refused: {error}")
                progress(done, len(adapters))
    finally:  # after the bar, and also what went before an error
        for manifest in pushed:
            typer.echo(f"{manifest.name}\t{manifest.version}\t{manifest.size} bytes")
    if catalog is not None and pushed:

        def take_in(before: Catalog) -> Catalog:
            for manifest in pushed:
                repository.check_current(manifest)
            return with_adapter(before, *pushed)

        changed = change_catalog(catalog, take_in, adapters=[manifest.name for manifest in pushed])
        notify(f"version {changed.version} of the catalog {catalog} serves them")
    elif pushed:
        notify(
            "a catalog serves them once 'lorauter catalog change --refresh-adapters' or 'push --catalog' takes them in"
        )
    notify(f"{len(adapters) - refused} of {len(adapters)} adapters are in {repository.store.uri}")
    if refused:
        raise typer.Exit(1)


@adapters_app.command("list")
def list_adapters(store: Annotated[str, typer.Argument(help="A folder, a store's URI, or 'default'.")]) -> None:
    """List a store's adapters: name, version, rank, bytes, base model."""
    repository = adapters_to_read(store)
    names = repository.names()
    for name in names:
        try:
            manifest = repository.manifest(name)
        except AdapterError as error:
            typer.echo(f"{name}\t{error}")
            continue
        rank = "-" if manifest.rank is None else manifest.rank
        typer.echo(f"{name}\t{manifest.version}\t{rank}\t{manifest.size}\t{manifest.base_model or '-'}")
    notify(f"{len(names)} adapters in {repository.store.uri}")


@adapters_app.command("prune")
def prune(
    store: Annotated[str, typer.Argument(help="A folder or a store's URI.")],
    catalogs: Annotated[
        list[str],
        typer.Option("--catalog", help="A catalog of these adapters, once for each: what its versions name stays."),
    ],
    older_than: Annotated[float, typer.Option(help="Hours for which a version has to be out of use.", min=0)] = 24,
) -> None:
    """Delete versions of adapters that were replaced, and that no version of a catalog names.

    `--catalog none` says that there is no catalog of these adapters.
    """
    from lorauter.catalog import named_adapters

    check_changeable(store, "adapters")
    keep = {
        key for catalog in catalogs if catalog != "none" for key in named_adapters(resolve_catalog(catalog, notify))
    }
    repository = adapters_to_read(store)
    with counting("looking for old versions", "adapters are done") as progress:
        pruned = repository.prune(keep=keep, older_than_s=older_than * 3600, progress=progress)
    for name, version in pruned:
        typer.echo(f"{name}\t{version}")
    notify(f"{len(pruned)} versions deleted from {repository.store.uri}")


@app.command()
def route(
    catalog: Annotated[str, typer.Option(help="The catalog: a folder, a store's URI, or 'default'.")],
    input: Annotated[Path, typer.Option(help='JSON lines {"input": text, "exclude_tasks": [...], ...}.')],
    output: Annotated[
        Path, typer.Option(help="JSON lines: the input rows with `tasks`, `adapters` and `confidence` added.")
    ],
    encoder: _Encoder = DEFAULT,
    states: States = DEFAULT,
    top_k: Annotated[int | None, typer.Option(help="Adapters in a mixture, at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides utilities before the softmax.")] = None,
    num_tasks: Annotated[int, typer.Option(help="Tasks to report for each row.")] = 10,
    examples: Annotated[
        int | None, typer.Option(help="Examples of the likeliest task to show before a query, at most.")
    ] = None,
) -> None:
    """Decide tasks and adapters for every row of a file, and generate nothing.

    A row may carry its own top_k, temperature, exclude_tasks, exclude_adapters, allow_adapters, constrain, which adds
    `constrained`, and examples, which adds `shown`; what else it carries is kept. The output appears whole, or not at
    all.
    """
    from lorauter.routing import Router, RoutingConfig, RoutingOptions

    try:
        given = {"top_k": top_k, "temperature": temperature, "num_tasks": num_tasks, "examples": examples}
        config = RoutingConfig.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    with phase("loading the encoder and the catalog"):
        asked = None if states == "none" else states
        router = Router.load(catalog_to_read(catalog), encoder=encoder, states=asked, config=config)
    count = 0
    try:
        with (
            counting(f"routing {input}", "rows are routed") as progress,
            input.open("rb") as source,
            written(output) as out,
        ):
            total = None  # of what can be read once only
            if source.seekable():
                total = sum(1 for line in source if line.strip())
                source.seek(0)
            rows = _read_rows(source, input, RoutingOptions)
            while batch := list(islice(rows, _BATCH)):
                decisions = router.route([row["input"] for row, _ in batch], [options for _, options in batch])
                for (row, _), decision in zip(batch, decisions, strict=True):
                    decided = decision.to_json()
                    answer = {**row, **{key: decided[key] for key in _DECIDED if key in decided}}
                    out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                count += len(batch)
                progress(count, total)
    except OSError as error:
        raise ConfigError(f"cannot route {input} to {output}: {error}") from error
    notify(f"routed {count} rows to {output}")


def _read_rows(source: Iterable[bytes], path: Path, options: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Rows with their routing options. Raises InvalidRequest, naming the line."""
    from lorauter.tasks import is_encodable

    for number, line in enumerate(source, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("input"), str) or not row["input"].strip():
                raise ValueError('a row is a JSON object with a non-empty string "input"')
            if not is_encodable(json.dumps(row, ensure_ascii=False)):
                raise ValueError("it holds half a character (a lone surrogate); mend the text")
            own = {key: row[key] for key in options.model_fields if row.get(key) is not None}
            yield row, options.model_validate_json(json.dumps(own))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise InvalidRequest(f"{path}, line {number}: {where}: {problem['msg']}", param=where) from error
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path}, line {number}: {error}", param="input") from error


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help=CONFIG_HELP)] = None,
    host: Annotated[str | None, typer.Option(help="In place of the configuration's.")] = None,
    port: Annotated[int | None, typer.Option(help="In place of the configuration's.", min=1, max=65535)] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; none starts a local one.")] = None,
) -> None:
    """Serve in the foreground until Ctrl-C."""
    from dataclasses import replace

    make_importable()
    with phase("loading Ray"):
        from deployments.launch import ServeFile, serve_forever

    file = ServeFile.read(config or shipped_config())
    file = replace(file, host=host or file.host, port=port or file.port)

    def ready(url: str, what: str) -> None:
        notify(f"serving {what}\n  page        {url}/\n  OpenAI API  {url}/v1")
        question = "Short movie review: a joy to watch. Did the critic think positively or negatively of the movie?"
        hint = f'serving on {url}; stop with Ctrl-C. Try:\n  {sys.argv[0]} chat --url {url} "{question}"'
        notify(hint)

    serve_forever(file, address=address, phase=phase, notify=notify, ready=ready)


@app.command()
def chat(
    text: Annotated[str, typer.Argument(help="What to ask.")],
    url: Annotated[str, typer.Option(help="A running server; with /v1 or without.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="'lorauter' routes; 'base', or an adapter's name.")] = "lorauter",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    key: Annotated[
        str | None, typer.Option("--key", envvar="LORAUTER_API_KEY", help="An API key.", show_envvar=True)
    ] = None,
) -> None:
    """Ask a running server; prints the routing, then the answer as it comes."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "max_tokens": max_tokens,
    }
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url {url!r} must begin with http:// or https://", setting="url")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        request = urllib.request.Request(  # noqa: S310 (the scheme is checked above)
            f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions", json.dumps(body).encode(), headers
        )
        response = urllib.request.urlopen(request)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            raise LorauterError(_message(error.read()) or f"the server answered {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise LorauterError(f"no server answers at {url} ({error}); start one with 'lorauter serve'") from error
    with response:
        _print_routing(response.headers)
        try:
            _print_answer(response)
        except (OSError, HTTPException) as error:
            raise LorauterError(f"the answer broke off: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LorauterError(f"{url} answers, but not what lorauter does: {error!r}") from error


def _print_routing(headers: Any) -> None:
    for name in ("tasks", "adapters"):
        value = (headers.get(f"x-lorauter-{name}") or "none").replace(",", "  ")
        console.print(f"{name}: {value}", style="dim", markup=False, soft_wrap=True)


def _print_answer(lines: Iterable[bytes]) -> None:
    """Print server-sent events' texts as they come, up to `[DONE]`."""
    for line in lines:
        field, _, data = line.decode().strip().partition(": ")
        if field != "data":
            continue
        if data == "[DONE]":
            typer.echo()
            return
        event = json.loads(data)
        if "error" in event:
            raise LorauterError(event["error"]["message"])
        for choice in event["choices"]:
            typer.echo(choice["delta"].get("content", ""), nl=False)
    raise LorauterError("the answer broke off: the server closed the connection")


def _message(raw: bytes) -> str | None:
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
