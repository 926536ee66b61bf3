"""The command ``swarm``: text from a swarm, and what it serves.

Heavy packages are imported inside the commands, so that ``--help`` answers at once.

Exit codes: 0 done, 1 a bug, 2 wrong usage, settings or checkpoint, 3 the swarm cannot serve this
now, 4 the network cannot be used, 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.client.adapter_commands import adapters
from swarm.client.audit_commands import app as audit_app
from swarm.client.authority_commands import authority
from swarm.client.config import SamplingSettings
from swarm.client.finetune.commands import finetune
from swarm.client.finetune.federation.commands import app as federate_app
from swarm.client.gateway.commands import app as gateway_app
from swarm.client.joining import (
    Config,
    Peers,
    PolicyFile,
    Swarm,
    joined,
    outcome,
    settings_from,
)
from swarm.client.kit_commands import kit
from swarm.client.ledger_commands import app as ledger_app
from swarm.client.model_commands import models
from swarm.client.operator_commands import operator_app
from swarm.client.output import Answer, explain, note
from swarm.client.status_commands import app as status_app
from swarm.client.validator.commands import validator_app
from swarm.client.witness_commands import witness_app
from swarm.protocol.errors import SwarmError, UsageError

if TYPE_CHECKING:
    from swarm.client.adapters import FoundAdapter
    from swarm.client.chat import Conversation
    from swarm.client.remote_blocks import SessionAdapter

DEFAULT_CONTEXT_TOKENS = 4096

app = typer.Typer(
    name="swarm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Text from a language model that a swarm of volunteers runs.\n\n"
    "Your words become numbers on this computer and leave it only as activations; the blocks of "
    "the model are computed by a chain of nodes. [bold]models[/bold] shows what a swarm serves, "
    "[bold]generate[/bold] answers once, [bold]chat[/bold] keeps a conversation.\n\n"
    "Exit codes: 0 done, 2 wrong usage, 3 the swarm cannot serve this now, 4 network trouble.",
)

app.add_typer(operator_app)
app.add_typer(witness_app)
app.add_typer(validator_app)
app.add_typer(gateway_app)
app.add_typer(status_app)
app.add_typer(models, name="models")
app.add_typer(authority, name="authority")
app.add_typer(adapters, name="adapters")
app.add_typer(ledger_app, name="ledger")
app.add_typer(audit_app, name="audit")
app.add_typer(kit, name="kit")
app.add_typer(federate_app)

# --- flags that several commands share -----------------------------------------------------------
Model = Annotated[
    str, typer.Argument(help="Checkpoint folder, or a name in the Hugging Face cache or hub.")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="auto, float32 or bfloat16. float32 is exact, auto is fast."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float,
    typer.Option("--temperature", help="0 takes the likeliest token; 0.7 varies, 1.5 rambles."),
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Only the likeliest tokens with this probability together.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Only the k likeliest tokens; 0 is all.")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 makes repetition less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same answer.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End at this text; repeatable.")
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME|PATH|auto",
        help="Answer with this adapter: a name in the catalogue, a folder with a LoRA or DoRA "
        "adapter in PEFT's format, or auto to pick one by the prompt's language and subject.",
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="What the model is told beforehand.")
]


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    'swarm generate SmolLM2-135M-Instruct --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW... "Hi!"'
    "\n\n"
    'swarm generate ./checkpoint --temperature 0.7 --seed 1 --system "Be brief." "Why is it dark?"'
    "\n\n"
    "swarm generate ./checkpoint --raw --json < story.txt"
)
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer; read from standard input if left out.")
    ] = None,
    peers: Peers = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is: no chat template.")
    ] = False,
    system: System = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = None,
    policy: PolicyFile = None,
    config: Config = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and nothing else.")
    ] = False,
) -> None:
    """Answer one prompt, streaming to the terminal; the chain that served it goes to stderr."""
    with outcome(as_json):
        sampling = SamplingSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
        )
        if raw and system is not None:
            raise UsageError("--system needs the chat template; leave --raw out")
        settings = settings_from(peers, dtype, config, policy)
        text = sys.stdin.read() if prompt in (None, "-") else str(prompt)
        if not text.strip():
            raise UsageError("the prompt is empty")
        with joined(model, settings) as swarm:
            from swarm.client.generate import stream_generate

            messages = [*_system_message(system), {"role": "user", "content": text}]
            prompt_ids = swarm.model.encode(text) if raw else swarm.model.encode_chat(messages)
            found = _found_adapter(swarm, adapter, text)
            pieces = stream_generate(
                swarm.client, swarm.model, prompt_ids, sampling, adapter=_source(found)
            )
            answer = Answer(shown=not as_json, adapter=found)
            swarm.background.run(answer.follow(pieces))
            answer.report(as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm chat SmolLM2-135M-Instruct --peers /ip4/192.0.2.1/tcp/31330/p2p/12D3KooW...\n\n"
    'swarm chat ./checkpoint --system "You are a patient teacher." --temperature 0.7'
)
def chat(
    model: Model,
    peers: Peers = None,
    system: System = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 512,
    max_context: Annotated[
        int,
        typer.Option(
            "--max-context", help="Tokens that the nodes reserve; older turns are forgotten."
        ),
    ] = DEFAULT_CONTEXT_TOKENS,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    dtype: Dtype = None,
    policy: PolicyFile = None,
    config: Config = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each answer.")
    ] = False,
) -> None:
    """Talk in turns. Ctrl-C stops an answer, a second one (or /quit) leaves; /new starts over."""
    with outcome(as_json):
        sampling = SamplingSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        settings = settings_from(peers, dtype, config, policy)
        with joined(model, settings) as swarm:
            from swarm.client.chat import Conversation

            conversation = Conversation(
                swarm.client, swarm.model, system=system, maximum_tokens=max_context
            )
            try:
                _talk(swarm, conversation, sampling, as_json, adapter)
            finally:
                swarm.background.run(conversation.close())


app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "swarm finetune ./checkpoint --peers ... --data swahili.jsonl --out ./adapter-sw\n\n"
    "swarm finetune ./checkpoint --data pairs.jsonl --out ./adapter --loss dpo --resume"
)(finetune)


def main() -> None:
    """Entry point of the console script; wrong usage ends with exit code 2."""
    app()


# --- conversations -------------------------------------------------------------------------------
def _talk(
    swarm: Swarm,
    conversation: Conversation,
    sampling: SamplingSettings,
    as_json: bool,
    adapter: str | None,
) -> None:
    """The turns of a chat, until the user leaves; an adapter is picked by the first of them."""
    interactive = sys.stdin.isatty() and not as_json
    if interactive:
        note("/quit leaves, /new starts over, Ctrl-C stops an answer")
    found: FoundAdapter | None = None
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()
            return
        if line == "/quit":
            return
        if line == "/new":
            conversation.forget()
            continue
        if not line:
            continue
        if not conversation.turns:
            found = _found_adapter(swarm, adapter, line)
            swarm.background.run(conversation.use_adapter(_source(found)))
        answer = Answer(shown=not as_json, adapter=found)
        try:
            swarm.background.run(answer.follow(conversation.answer(line, sampling)))
        except KeyboardInterrupt:
            print()
            note("stopped")
        except SwarmError as error:
            if not interactive:
                raise
            print()
            note(f"{explain(error)}; ask again to try another chain")
        conversation.remember_answer(answer.text)
        answer.report(as_json)


def _found_adapter(swarm: Swarm, wanted: str | None, prompt: str) -> FoundAdapter | None:
    """The adapter that was asked for; what was picked and why is said."""
    if wanted is None:
        return None
    from swarm.client.adapters import find_adapter

    library = swarm.client.library()
    found = swarm.background.run(
        find_adapter(wanted, swarm.model.checkpoint, library, prompt=prompt)
    )
    if found.reason:
        note(f"adapter: {found.name or 'none, the bare model answers'} ({found.reason})")
    return found


def _source(found: FoundAdapter | None) -> SessionAdapter | None:
    return None if found is None else found.source


def _system_message(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


if __name__ == "__main__":
    main()
