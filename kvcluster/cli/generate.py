"""`kvcluster generate`: one prompt to a running cluster, the answer to stdout as it comes."""

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer

from kvcluster.cli.api_key import API_KEY_HELP, api_key_from
from kvcluster.cli.connection import Server, parse_server
from kvcluster.cli.exits import ExitCode, exiting, print_json
from kvcluster.cli.transcript import GenerateReport, Transcript
from kvcluster.engine.api import FinishReason, Output
from kvcluster.errors import InvalidField

if TYPE_CHECKING:
    from kvcluster.client import GenerateOptions

DEFAULT_SERVER = Server("localhost:50051")
_POLICY_HELP = (
    "How the cache is compressed: a codec (exact, int8, int4 ...), a retention or both ('int4 + "
    "window'), with arguments ('heavy_hitters:budget=20%'), or a bound ('auto: ppl<=1%'). Default: "
    "the server's. `kvcluster doctor --server` lists what it offers."
)


class GivenPrompt(NamedTuple):
    """As text or as token ids: one of them is set."""

    text: str | None
    token_ids: list[int] | None


def prompt_from(text: str | None, file: Path | None, prompt_ids: Path | None) -> GivenPrompt:
    """The one prompt that is given. Raises: InvalidField."""
    if sum(source is not None for source in (text, file, prompt_ids)) != 1:
        raise InvalidField("prompt", "want one of PROMPT (- is stdin), --file, --prompt-ids")
    return GivenPrompt(
        text=None if prompt_ids else _text(text, file),
        token_ids=_token_ids(prompt_ids) if prompt_ids else None,
    )


def generate(
    *,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads stdin.")] = None,
    server: Annotated[
        Server, typer.Option(parser=parse_server, metavar="HOST:PORT", help="A router.")
    ] = DEFAULT_SERVER,
    model: Annotated[str, typer.Option(help="Default: the one that is served.")] = "",
    file: Annotated[Path | None, typer.Option(help="UTF-8 file with the prompt.")] = None,
    prompt_ids: Annotated[
        Path | None, typer.Option(help="JSON file with the prompt as a list of token ids.")
    ] = None,
    policy: Annotated[str, typer.Option(metavar="POLICY", help=_POLICY_HELP)] = "",
    context: Annotated[
        str, typer.Option(help="A stored context that comes before the prompt (`contexts`).")
    ] = "",
    cache: Annotated[
        str, typer.Option(help="Blocks of earlier requests: read-write, read-only or bypass.")
    ] = "read-write",
    cache_namespace: Annotated[
        str, typer.Option(help="Blocks are shared within a namespace only.")
    ] = "",
    max_output_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the likeliest's.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; may be given again.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")
    ] = False,
    request_id: Annotated[str, typer.Option(help="A retry with it never runs twice.")] = "",
    timeout: Annotated[float | None, typer.Option(help="Deadline in seconds.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help=API_KEY_HELP)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One object on stdout instead of the text.")
    ] = False,
) -> None:
    """Generate from a prompt. Ctrl-C cancels the generation."""
    with exiting(as_json=as_json):
        source = prompt_from(prompt, file, prompt_ids)
        options: GenerateOptions = {
            "model": model,
            "policy": policy,
            "max_output_tokens": max_output_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "stop": tuple(stop or ()),
            "ignore_eos": ignore_eos,
            "request_id": request_id,
            "context": context,
            "cache_mode": cache.replace("-", "_"),
            "cache_namespace": cache_namespace,
            "timeout_s": timeout,
        }
        key = api_key_from(api_key_file)
        report = asyncio.run(_run(server, key, source, options, writes_text=not as_json))
        if as_json:
            print_json(report)
        else:
            typer.echo(f"\n{_summary(report)}", err=True)
        if report.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):
            raise typer.Exit(ExitCode.ENDED_EARLY)


async def _run(
    server: Server,
    api_key: str | None,
    source: GivenPrompt,
    options: "GenerateOptions",
    *,
    writes_text: bool,
) -> GenerateReport:
    # Only here, so that --help and usage errors come without waiting for grpc and rich.
    from rich.console import Console

    from kvcluster.cli.prefill_bar import PrefillBar
    from kvcluster.client import Client

    transcript = Transcript(time.monotonic)
    with PrefillBar(Console(stderr=True), is_transient=True) as bar:
        async with Client(server.address, api_key=api_key, tls=server.tls) as client:
            events = client.generate(prompt=source.text, prompt_ids=source.token_ids, **options)
            async for received in events:
                transcript.add(received)
                bar.show(received.event)
                if writes_text and isinstance(received.event, Output):
                    sys.stdout.write(received.event.text)
                    sys.stdout.flush()
    return transcript.report()


def _text(prompt: str | None, file: Path | None) -> str:
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise InvalidField("--file", f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        rule = f"want UTF-8, byte {error.start} of the prompt is not"
        raise InvalidField("--file" if file else "prompt", rule) from error
    return prompt or ""


def _token_ids(file: Path) -> list[int]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[int])
    except OSError as error:
        raise InvalidField("--prompt-ids", f"{file} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InvalidField("--prompt-ids", f"want a JSON list of whole numbers: {error}") from error


def _summary(report: GenerateReport) -> str:
    usage, timings = report.usage, report.timings
    parts = [f"{report.finish_reason}: {usage.input_tokens:,} + {usage.output_tokens:,} tokens"]
    if usage.cached_input_tokens:
        parts.append(f"{usage.cached_input_tokens:,} of them cached")
    if timings.time_to_first_token_s is not None:
        parts.append(f"first token after {timings.time_to_first_token_s:.2f} s")
    if timings.output_tokens_per_s is not None:
        parts.append(f"{timings.output_tokens_per_s:.1f} tokens/s")
    policy = report.policy + (f" for {report.policy_bound}" if report.policy_bound else "")
    cache = f"{usage.kv_bytes / 1024**2:.1f} MiB of cache ({policy}"
    if 0 < usage.kv_bytes < usage.kv_bytes_uncompressed:
        cache += f", {usage.kv_bytes_uncompressed / usage.kv_bytes:.1f} times smaller"
    if usage.attention_error:
        cache += f", attention error {usage.attention_error:.1%}"
    parts.append(cache + ")")
    return ", ".join(parts)
