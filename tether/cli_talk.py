"""The commands that speak to a gateway, as any client does: explain and chat."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether.options import AsJson, Key, Url


def explain(
    model: Annotated[str, typer.Option("--model", "-m", help="A model's name, or name@version.")],
    tenant: Annotated[str | None, typer.Option("--tenant", help="For this tenant.", show_default="the key's")] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=131072, help="That the job may use, prompt and answer.")
    ] = 256,
    region: Annotated[str | None, typer.Option("--region", help="Where the client would like it to run.")] = None,
    session: Annotated[str | None, typer.Option("--session", help="The session that it belongs to.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Say what would happen to a job now, and why: worker by worker, the queue, the limits. No job is made.

    Examples: `tether explain --model demo`, `tether explain -m phi-2 --tenant acme --tokens 2000 --json`
    """
    from tether import console
    from tether.client import GatewayClient
    from tether.options import gateway_url

    client = GatewayClient(gateway_url(url), key)
    found = client.get("/v1/explain", model=model, tenant_id=tenant, tokens=tokens, region=region, session_key=session)
    if as_json:
        console.print_json(found)
        return
    error, waiting = found["error"], found["waiting"]
    console.print_facts(
        [
            ("model", f"{found['model']} {found['version']}".strip()),
            ("a job now", _outcome(found)),
            *([("error", error["code"]), ("why", error["message"])] if error else []),
            *([("place", waiting["place"]), ("expected wait", _wait(waiting))] if waiting else []),
            ("waiting", _num_waiting(found)),
            ("tokens", f"{found['tokens']} reserved until it ends"),
            ("asked", f"orchestrator {found['orchestrator_name']} ({found['orchestrator_id'][-8:]})"),
        ]
    )
    console.print_line()
    _print_workers(found["workers"])
    if found["limits"]:
        console.print_line()
        rows = [
            (limit["name"], limit["of"], limit["model"], limit["left"], limit["most"],
             f"{limit['reset_seconds']:.0f}s" if limit["reset_seconds"] else "")
            for limit in found["limits"]
        ]  # fmt: skip
        console.print_table(("LIMIT", "OF", "MODEL", "LEFT", "MOST", "RESETS IN"), rows, "")


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model's name.", show_default="the one that is served")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, max=131072, help="Of each answer.", show_default="the gateway's"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, max=2, help="0 is the same each time.", show_default="1")
    ] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Talk to a model. Ctrl-C ends an answer, Ctrl-D leaves, `/help` says what else can be typed.

    Examples: `tether chat`, `tether chat demo --temperature 0`, `echo "What is the capital of France?" | tether chat`
    """
    from tether.chat_client import ChatOptions, pick
    from tether.client import GatewayClient
    from tether.options import gateway_url
    from tether.terminal_chat import TerminalChat

    client = GatewayClient(gateway_url(url), key)
    talk = TerminalChat(client, pick(client, model), system=system, options=ChatOptions(max_tokens, temperature))
    raise typer.Exit(talk.run())


def _outcome(found: dict[str, Any]) -> str:
    match found["outcome"]:
        case "runs":
            return f"runs at once on {found['workers'][0]['name']}"
        case "waits":
            return "waits for a slot"
        case _:
            return "is refused"


def _wait(waiting: dict[str, Any]) -> str:
    seconds = waiting["expected_seconds"]
    return f"about {seconds:g} s" if seconds is not None else "nobody can say yet: no job has ended lately"


def _num_waiting(found: dict[str, Any]) -> str:
    own = f"{found['num_own_waiting']} of this tenant"
    return own if found["num_waiting"] is None else f"{found['num_waiting']} jobs, {own}"


def _why_not(worker: dict[str, Any]) -> str:
    reason = (worker["reason"] or "").replace("_", " ")
    return f"{reason}: {worker['detail']}" if worker.get("detail") else reason


def _print_workers(workers: list[dict[str, Any]]) -> None:
    from tether import console

    parts = list(next((worker["parts"] for worker in workers if worker["parts"]), {}))
    rows = [
        (worker["worker_id"][-8:], worker["name"], worker["region"], f"{worker['free_slots']}/{worker['slots']}",
         "" if worker["score"] is None else f"{worker['score']:.1f}",
         *(f"{worker['parts'][part]:.1f}" if worker["parts"] else "" for part in parts),
         _why_not(worker))
        for worker in workers
    ]  # fmt: skip
    named = [part.replace("_", " ").upper() for part in parts]
    columns = ("WORKER", "NAME", "WHERE", "FREE", "SCORE", *named, "WHY NOT")
    console.print_table(columns, rows, "no workers; start one with `tether worker --model demo`")
