"""Keys of a gateway in a real swarm: whom a key's policy lets see anything, and who pays for it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.local_gateway import LocalGateway
from scripts.local_swarm import LocalSwarm, Member, Span, SwarmPlan
from scripts.process_keeper import KeptProcess
from scripts.verify_proof import check_file
from swarm.authority import Authority
from swarm.client.gateway.keys import KeyFile, Payer, make_key
from swarm.membership_files import CHARTER, PASSPORT, write_file
from swarm.operator.settings import create_folder, load_settings
from swarm.protocol.identity import Identity
from swarm.protocol.passport import AdmissionMode, Charter, Tier
from swarm.protocol.policy import Policy
from swarm.protocol.prices import UNITS_PER_CREDIT
from tests.adapter_making import make_adapter
from tests.integration.client.gateway.conftest import byte_tokenizer
from tests.integration.client.gateway.waiting import until, until_it_is

SWARM = Path(sys.executable).with_name("swarm")
BLOCKS = 4
SESSIONS_A_DAY = 2
PLACES = {
    "node-1": {"organisation": "KENET", "country": "KE", "tier": Tier.TRUSTED},
    "node-2": {"organisation": "UDSM", "country": "TZ", "tier": Tier.REGISTERED},
}
KENYA = Policy(countries=("KE",))


def swarm(*arguments: str | Path) -> str:
    command = [str(SWARM), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Operator:
    """An operator whose budget ``schools`` a member may draw on, for so many sessions a day."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.books = folder / "books"
        mint_keys = [Identity.load_or_create(folder / f"{n}.key") for n in "abc"]
        publics = [key.public_key_bytes.hex() for key in mint_keys]
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        create_folder(self.books, "keys.example/ledger", publics, address)
        self.key = load_settings(self.books).policy.operator_key.hex()
        settings = self.books / "operator.toml"
        settings.write_text(settings.read_text() + "[policy]\nnodes_per_allowance = 1\n")

    @contextmanager
    def running(self) -> Iterator[None]:
        process = KeptProcess(
            [str(SWARM), "operator", "run", str(self.books)], stdout=subprocess.PIPE, stderr=None
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"listening on http://")
            yield
        finally:
            process.stop()
            if process.stdout is not None:
                process.stdout.close()

    def fund(self, member: str) -> None:
        signers = ("--key", self.folder / "a.key", "--key", self.folder / "b.key")
        at = ("--operator", self.url)
        swarm("operator", "mint", "schools", "100", "--reason", "a test", *at, *signers)
        daily = ("--daily-credits", str(SESSIONS_A_DAY))
        swarm("operator", "member", self.books, member, "schools", *daily, *at)

    @property
    def budget_units(self) -> int:
        url = f"{self.url}/v1/accounts/budget:schools"
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - ours, on loopback
            return int(json.load(response)["balance"])


@dataclass
class Land:
    """A gateway in front of a node in Kenya and one in Tanzania, and an operator who is away."""

    swarm: LocalSwarm
    gateway: LocalGateway
    keys: KeyFile
    operator: Operator
    ledger: Path

    def key(self, name: str, policy: Policy | None = None, payer: Payer | None = None) -> str:
        key, text = make_key(name, policy=policy, payer=payer)
        self.keys.add(key)
        return text

    async def ask(self, key: str, model: str = "tiny") -> tuple[str, ...]:
        """One answer; the countries of the nodes that served it."""
        async with openai.AsyncOpenAI(
            base_url=f"{self.gateway.url}/v1", api_key=key, max_retries=0
        ) as client:
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Hello?"}],
                max_tokens=3,
                stream=True,
                extra_body={"stream_options": {"include_chain": True}},
            )
            chain: Any = ()
            async for chunk in stream:
                for served in (chunk.model_extra or {}).get("swarm", ()):
                    chain = served["chain"]
        by_peer = {node.peer_id: PLACES[node.name]["country"] for node in self.swarm.nodes}
        return tuple(str(by_peer[hop["peer_id"]]) for hop in chain)

    async def refusal(self, key: str, model: str = "tiny") -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as refused:
            await self.ask(key, model)
        return refused.value


def sessions_opened(node: Member) -> int:
    """By the node's own count."""
    assert node.metrics_url is not None
    with urllib.request.urlopen(node.metrics_url, timeout=10) as reply:  # noqa: S310 - on loopback
        (count,) = re.findall(r"^swarm_node_sessions_total (\S+)$", reply.read().decode(), re.M)
    return int(float(count))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    make_adapter(model, folder.parent / "parrot")
    return folder


@pytest.fixture(scope="module")
def land(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Land]:
    folder = tmp_path_factory.mktemp("land")
    open_to_all = Charter(bytes(32), 1, "Land", AdmissionMode.OPEN, (), hub=False)
    authority = Authority.found(folder / "authority", open_to_all)
    charter = folder / "charter.swarm"
    write_file(CHARTER, charter, authority.sealed_charter)
    environments = {}
    for name, place in PLACES.items():
        identity = Identity.load_or_create(folder / "logs" / f"{name}.key")
        passport = folder / f"{name}.passport"
        write_file(PASSPORT, passport, authority.issue(identity.peer_id, **place))  # type: ignore[arg-type]
        environments[name] = {
            "SWARM_NODE_PASSPORT": str(passport),
            "SWARM_NODE_DATA_DIR": str(folder / name),
        }
    operator = Operator(folder)
    plan = SwarmPlan(
        checkpoint,
        (Span(0, BLOCKS),) * len(PLACES),
        threads=1,
        logs=folder / "logs",
        environment={
            "SWARM_NODE_CHARTER": str(charter),
            "SWARM_NODE_OPERATOR_KEYS": operator.key,
            "SWARM_NODE_DATA_DIR": str(folder / "seed"),
            "HOME": str(folder),
        },
        environments=environments,
    )
    settings = folder / "gateway.toml"
    ledger = folder / "gateway.ledger"
    settings.write_text(
        f'charter = "{charter}"\nledger_file = "{ledger}"\naudits = false\n'
        f'operator_url = "{operator.url}"\noperator_key = "{operator.key}"\n'
        '[gateway]\nmodels = []\nresume_patience_s = 0.5\n'
    )  # fmt: skip
    adapter = f"parrot={checkpoint.parent / 'parrot'}"
    with LocalSwarm(plan) as nodes:
        keys = KeyFile(folder / "keys.json")
        keys.add(make_key("first")[0])
        options = ("--config", str(settings), "--adapter", adapter)
        with LocalGateway(checkpoint, nodes.peers, folder, *options) as gateway:
            yield Land(nodes, gateway, keys, operator, ledger)


async def test_a_key_s_account_pays_until_it_has_nothing_left(land: Land, tmp_path: Path) -> None:
    member = Identity.load_or_create(tmp_path / "member.key")
    stranger = Identity.load_or_create(tmp_path / "stranger.key")
    paid = land.key("paid", payer=Payer(member.peer_id, str(tmp_path / "member.key"), "schools"))
    unknown = land.key(
        "unknown", payer=Payer(stranger.peer_id, str(tmp_path / "stranger.key"), "schools")
    )
    lost = land.key("lost", payer=Payer(member.peer_id, str(tmp_path / "lost.key"), "schools"))
    free = land.key("free")
    with land.operator.running():
        await asyncio.to_thread(land.operator.fund, member.peer_id)
        before = land.operator.budget_units
        for _ in range(SESSIONS_A_DAY):
            assert await land.ask(paid)
        assert before - land.operator.budget_units == SESSIONS_A_DAY * UNITS_PER_CREDIT
        refused = await land.refusal(paid)
        assert isinstance(refused, openai.RateLimitError)
        assert (refused.code, refused.type) == ("insufficient_quota", "insufficient_quota")
        assert "used up" in refused.message
        assert refused.response.headers["x-should-retry"] == "false"
        refused = await land.refusal(unknown)
        assert (refused.status_code, refused.code) == (403, "account_refused")
        refused = await land.refusal(lost)
        assert (refused.status_code, refused.code) == (503, "account_unavailable")
        # Nobody else's answers depend on it.
        assert await land.ask(free)
        assert before - land.operator.budget_units == SESSIONS_A_DAY * UNITS_PER_CREDIT

    async def is_served() -> float:
        try:
            return len(await land.ask(paid))
        except openai.RateLimitError:
            return 0

    # Without the operator it is served again, once what it said is no news any more.
    await until_it_is(is_served, 1, 60)


async def test_a_key_s_policy_is_kept_or_its_answers_are_refused(
    land: Land, tmp_path: Path
) -> None:
    kenyan, tanzanian = land.swarm.nodes
    kenya = land.key("kenya", KENYA)
    outside = sessions_opened(tanzanian)
    served = await asyncio.gather(*(land.ask(kenya) for _ in range(10)))
    assert set(served) == {("KE",)}
    assert sessions_opened(tanzanian) == outside
    for policy in (
        Policy(organisations=("KENET",)),
        Policy(minimum_tier=Tier.CERTIFIED),
        Policy(minimum_end_tier=Tier.TRUSTED, end_blocks=1),
        Policy(avoid=(tanzanian.peer_id,)),
    ):
        chain = await land.ask(land.key(policy.describe()[:99], policy))
        assert (chain[0], chain[-1]) == ("KE", "KE"), policy
        if not policy.minimum_end_tier:
            assert set(chain) == {"KE"}
    assert await land.ask(land.key("not there", Policy(avoid=(kenyan.peer_id,)))) == ("TZ",)
    for policy, model, status, said in (
        (Policy(countries=("UG",)), "tiny", 503, "countries UG"),
        (Policy(adapters=("ab" * 32,)), "tiny@parrot", 403, "adapter"),
    ):
        refused = await land.refusal(land.key(said, policy), model)
        assert (refused.status_code, refused.code) == (status, "policy_unmet")
        assert said in refused.message
    assert await land.ask(land.key("any adapter"), "tiny@parrot")
    # Nobody is left who may: refused, and the node outside hears nothing of it.
    outside = sessions_opened(tanzanian)
    kenyan.process.kill()
    refused = await land.refusal(kenya)
    assert (refused.status_code, refused.code) == (503, "policy_unmet")
    assert "countries KE" in refused.message
    assert sessions_opened(tanzanian) == outside
    assert await land.ask(land.key("anywhere")) == ("TZ",)
    # What was kept can be shown to anybody.
    proof = tmp_path / "proof"
    kept = KENYA.to_bytes().decode()

    def proven() -> int:
        swarm("ledger", "prove", proof, "--received", "--ledger", land.ledger)
        found = check_file(proof.read_bytes())
        return int(found["policies"].get(kept, 0))

    await until(lambda: proven() == 10, 60)
