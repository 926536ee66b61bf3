"""Two validating organisations, an operator and six nodes, of which one cheats: who loses what."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.challenge_terms import ChallengeTerms
from swarm.client.config import ClientSettings
from swarm.client.generate import LocalModel
from swarm.client.grants import GrantTerms, OperatorGrants
from swarm.client.validator.app import own_weights
from swarm.client.validator.challenges import Lengths
from swarm.client.validator.delivery import Posted
from swarm.client.validator.docket import RIGHT_FOR_RECHECK, Case
from swarm.client.validator.process import (
    Challenged,
    Validator,
    ValidatorSettings,
    organisation_of,
)
from swarm.client.validator.prompts import PrivateTexts
from swarm.client.validator.standings import Standings
from swarm.client.validator.state import ValidatorState, summaries
from swarm.ledger.audit_rule import SIXTEEN_BIT
from swarm.ledger.operator_client import OperatorClient, Quarantined
from swarm.membership import read_nodes
from swarm.node.engine.api import Engine
from swarm.node.engine.engine import load_engine_blocking
from swarm.operator.api import OperatorApi
from swarm.operator.app import serve
from swarm.operator.books import Books
from swarm.operator.doors import OneThread
from swarm.operator.journal import Journal
from swarm.operator.nodes import ACTIVE, QUARANTINED, REVOKED
from swarm.operator.settings import create_folder, load_settings
from swarm.operator.uptime import HOUR_S, HOURS
from swarm.protocol import strict_json
from swarm.protocol.errors import ConfigError, NetworkError, SwarmError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.ledger_objects import (
    FUNDED,
    LOCAL,
    Allowance,
    Revocation,
    Settlement,
    Verdict,
    Voucher,
    parse,
    sign,
)
from swarm.protocol.merkle import leaf_hash, root_of
from swarm.protocol.operator_objects import Enrolment, ModelPrice, NodeCertificate
from swarm.simulation.evil import Behaviour
from swarm.virtual_time import LoopClock
from tests.adapter_making import make_adapter
from tests.adapter_publisher import Publisher
from tests.letters_tokenizer import LETTERS, save_letters_tokenizer
from tests.sim import evil_swarm
from tests.sim.evil_swarm import EvilSwarm
from tests.unit.operator.parties import MFLOP, World, key, peer, policy, public
from tests.unit.operator.parties import identity as party

BLOCKS = 6
POT = 6000
MOST_CHALLENGES = 24
SHORT = Lengths(prompt_characters=(20, 60), answer_tokens=(6, 12))
CREDIT = 10**9
NOBODY = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWA"
"""Clients join through the memory network; their settings have to name a peer all the same."""
SMALL = 0.033
"""Size of an adapter that does little."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(LETTERS),
        max_position_embeddings=384,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_letters_tokenizer(folder)
    return Checkpoint.open(folder)


class TinySwarm(EvilSwarm):
    """Three nodes for each half of a tiny model, with real engines, in a memory network."""

    def __init__(self, evil: Sequence[Behaviour | None], checkpoint: Checkpoint) -> None:
        super().__init__(evil)
        self.spans = ((0, 3), (3, BLOCKS))
        self.revision = checkpoint.revision
        self.hidden_size = checkpoint.hidden_size
        self.operators = (public("operator"),)
        self._checkpoint = checkpoint

    async def _engine(self, stack: AsyncExitStack, span: tuple[int, int]) -> Engine:
        engine = await asyncio.to_thread(
            load_engine_blocking,
            self._checkpoint,
            *span,
            device="cpu",
            dtype="float32",
            threads=1,
            cache_tokens=4096,
        )
        stack.push_async_callback(engine.close)
        return engine

    async def _announced(self) -> None:
        somebody = self.network.join(Identity.generate())
        found = 0
        async with asyncio.timeout(30):
            while found < 6:
                found = len(await read_nodes(somebody, self.revision, self.clock))
                await asyncio.sleep(0)


class Desk:
    """The operator, its door open or not; all six nodes are in its books, one of them lab's."""

    def __init__(self, folder: Path, swarm: TinySwarm) -> None:
        keys = [public(f"mint-{number}").hex() for number in range(3)]
        create_folder(folder, "operator.example/ledger", keys, "127.0.0.1:0")
        terms = policy(minimum_node_age_s=0, uptime_daily_units=POT)
        self.settings = replace(load_settings(folder), policy=terms)
        self.books = Books(Journal.open(folder / "books.sqlite"), terms, key("operator"))
        self.world = World(self.books, int(time.time()))
        self.thread = OneThread("books")
        self.port = 0
        self.world.order(
            ModelPrice(swarm.revision.hex(), BLOCKS, MFLOP, self.world.now), "operator"
        )
        self.world.mint("audit", 1000 * CREDIT)
        self.world.mint("uptime", 10 * POT)
        self.world.fund("alice", CREDIT)
        for name in ("lab", "telco"):
            self.world.organisation(name, may_validate=True)
        self.own, self.evil = evil_swarm.identity(1), evil_swarm.identity(6)
        for number in range(1, 7):
            self.enrol(evil_swarm.identity(number), "lab" if number == 1 else "")

    def enrol(self, node: Identity, organisation: str) -> None:
        now = self.world.now
        certificate = None
        if organisation:
            stated = NodeCertificate(node.peer_id, organisation, now, now + 86400)
            certificate = sign(stated, key(organisation))
        enrolment = Enrolment(node.peer_id, node.peer_id, organisation, 1, now)
        self.books.enrol(sign(enrolment, node.private_key), certificate, now)

    def earn(self, node: Identity, model: str) -> int:
        """What alice pays it waits in its escrow; returns how much."""
        client = self.world.request("alice", units=CREDIT // 2)
        voucher = parse(Voucher, client.voucher("node", 1000))
        voucher = replace(voucher, node=node.peer_id, model=model, end_block=3)
        sealed = sign(voucher, client.voucher_key)
        root = root_of([leaf_hash(sealed.payload)]).hex()
        now = self.world.now
        batch = Settlement(node.peer_id, now - 3600, now, 1, root, 0, "00" * 32)
        (outcome,) = self.books.settle(sign(batch, node.private_key), [sealed], now)
        assert outcome.code is None
        return self.waiting(node)

    def accuse(self, node: Identity, accuser: str, model: str) -> None:
        """Two failed segments, whatever the node has done."""
        for segment in ("aa" * 32, "bb" * 32):
            found = Verdict(
                segment,
                node.peer_id,
                "22" * 16,
                model,
                *(0, 3),
                *(0, 16),
                *(500_000, 700_000, 30_000, 50_000),
                *("33" * 32, "44" * 32, "55" * 32),
                "float32",
                "failed",
                self.world.now,
            )
            self.books.take_verdict(sign(found, key(accuser)), self.world.now)

    def waiting(self, node: Identity) -> int:
        return self.books.journal.balance(f"escrow:{node.peer_id}")

    def state(self, node: Identity) -> str:
        return str(self.books.node(node.peer_id)["state"])

    def clean_audits(self, node: Identity) -> int:
        return int(self.books.node(node.peer_id)["clean_audits"])

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        application = OperatorApi(self.settings, self.books, self.thread, b"salt").application()
        async with serve(application, "127.0.0.1", self.port) as url:
            self.port = int(url.rpartition(":")[2])
            yield url

    def close(self) -> None:
        self.thread.close()
        self.books.journal.close()


TEXT = " ".join(
    f"the {first} {second} of the {third} was {fourth} than anybody had thought it could be."
    for first in ("old", "new", "red", "small")
    for second in ("house", "river", "garden", "letter")
    for third in ("teacher", "sailor", "doctor", "farmer")
    for fourth in ("larger", "darker", "colder", "better")
)


class Hurried(LoopClock):
    """Nobody waits for minutes."""

    async def sleep(self, duration_s: float) -> None:
        assert duration_s >= 0
        await asyncio.sleep(0)


class Organisation:
    """One organisation's validator, which can be restarted."""

    def __init__(
        self,
        name: str,
        folder: Path,
        swarm: TinySwarm,
        model: LocalModel,
        operator: OperatorClient,
        *,
        has_weights: bool = False,
        only_rechecks: bool = False,
        publishers: tuple[str, ...] = (),
    ) -> None:
        self.path = folder / f"{name}.state"
        self.made: list[Challenged] = []
        self.posted: list[Posted] = []
        self.clients: list[PeerId] = []
        self._changed = asyncio.Event()
        self._swarm = swarm
        self._model = model
        self._operator = operator
        self._reference = own_weights(model.checkpoint) if has_weights else None
        self.only_rechecks = only_rechecks
        self._settings = ClientSettings(peers=(NOBODY,), publishers=publishers)
        self._identity = party(name)
        self.grants = OperatorGrants(
            GrantTerms("", public("operator"), CREDIT, self._identity, "", True),
            operator,
            swarm.clock,
        )

    @asynccontextmanager
    async def running(self, seed: int) -> AsyncIterator[Validator]:
        state = await asyncio.to_thread(ValidatorState.open, self.path)
        try:
            yield Validator(
                ValidatorSettings(self._identity, only_rechecks=self.only_rechecks, lengths=SHORT),
                state,
                PrivateTexts([TEXT], state.used),
                self._model,
                self._connect,
                self._operator,
                clock=Hurried(),
                dice=random.Random(seed),
                organisation=await organisation_of(self._operator, self._identity, state),
                grants=self.grants,
                reference=self._reference,
                posted=self._posted,
            )
        finally:
            await state.close()

    async def make_and_post(self, challenges: int) -> None:
        """The program's loop, without its waits, until so many were made and all was posted."""
        wanted = len(self.made) + challenges
        async with self.running(5) as validator:
            task = asyncio.create_task(validator.run(self.hear))
            try:
                async with asyncio.timeout(120):
                    while len(self.made) < wanted or len(self.posted) < self.verdicts:
                        self._changed.clear()
                        await self._changed.wait()
            finally:
                task.cancel()
                await asyncio.wait({task})
            assert task.cancelled()

    def hear(self, made: Challenged | SwarmError | None) -> None:
        """None says that nothing is left to be looked at."""
        assert not isinstance(made, SwarmError)
        if made is not None:
            self.made.append(made)
        self._changed.set()

    def _posted(self, posted: Posted) -> None:
        self.posted.append(posted)
        self._changed.set()

    @property
    def verdicts(self) -> int:
        return sum(each.outcome is not None for made in self.made for each in made.judged)

    async def _connect(self, terms: ChallengeTerms) -> SwarmClient:
        """As ``SwarmClient.connect`` does over libp2p."""
        if self.clients and self._swarm.network.peer(self.clients[-1]) is not None:
            self._swarm.network.crash(self.clients[-1])  # it has left; nobody else takes it out
        identity = Identity.generate()
        self.clients.append(identity.peer_id)
        return SwarmClient(
            self._swarm.network.join(identity),
            clock=self._swarm.clock,
            settings=self._settings,
            challenge=terms,
            grants=self.grants,
        )

    def findings_of(self, node: Identity) -> list[str]:
        return [
            each.finding.found.value
            for made in self.made
            for each in made.judged
            if each.finding.peer_id == node.peer_id
        ]


async def test_a_cheat_is_quarantined_by_one_and_revoked_by_two_and_honest_nodes_are_seen(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    swarm = TinySwarm((None, Behaviour.SKIP), checkpoint)
    desk = Desk(tmp_path / "books", swarm)
    earned = desk.earn(desk.evil, swarm.revision.hex())
    spent = desk.books.journal.balance(f"user:{peer('alice')}")
    assert earned > 0
    model = LocalModel.load(str(checkpoint.path), dtype="float32")
    async with swarm.nodes_running():
        async with desk.open() as url:
            pass
        async with OperatorClient(url) as operator:
            lab = Organisation("lab", tmp_path, swarm, model, operator, has_weights=True)
            telco = Organisation("telco", tmp_path, swarm, model, operator, only_rechecks=True)
            with pytest.raises(NetworkError):
                async with lab.running(0):
                    pass  # it was never told whose key it has
            async with desk.open(), lab.running(1) as validator:
                lab.hear(await validator.challenge())
            # The operator is away: what is found now waits, also over a restart.
            async with lab.running(2) as validator:
                lab.hear(await validator.challenge())
                with pytest.raises(NetworkError):
                    await validator.delivery.deliver()
            assert lab.posted == []
            waiting = sum(each.waiting for each in summaries(lab.path))
            signed = [each for made in lab.made for each in made.judged if each.outcome]
            assert waiting == len(signed) >= 1
            async with desk.open(), lab.running(3) as validator:
                await validator.delivery.deliver()
                assert len(lab.posted) == waiting
                before = desk.clean_audits(evil_swarm.identity(2))
                for posted in lab.posted:  # the same again changes nothing
                    await operator.verdict(posted.verdict.sealed)
                assert desk.clean_audits(evil_swarm.identity(2)) == before
                await validator.delivery.deliver()
                assert len(lab.posted) == waiting
                while desk.state(desk.evil) != QUARANTINED:
                    assert len(lab.made) < MOST_CHALLENGES
                    await validator.once(lab.hear)
            assert desk.waiting(desk.evil) == earned  # frozen, and not more
            async with desk.open():
                listed = [Quarantined(desk.evil.peer_id, "", ("lab",))]
                assert await operator.quarantined() == listed
                # A second organisation, without the weights, by challenges of its own.
                async with telco.running(4) as validator:
                    await validator.once(telco.hear)
                assert desk.state(desk.evil) == REVOKED
                assert await operator.quarantined() == []
                # And both go on with the others, until they are told to end.
                telco.only_rechecks = False
                for organisation in (telco, lab):
                    await organisation.make_and_post(4)
    model.close()
    # The cheat has lost what it earned to whom had paid it.
    assert desk.waiting(desk.evil) == 0
    assert desk.books.journal.balance(f"user:{peer('alice')}") == spent + earned
    assert set(telco.findings_of(desk.evil)) == {"failed"}
    assert {made.target.case for made in telco.made[:2]} == {Case.RECHECK}
    assert all(made.target.node == desk.evil.peer_id for made in telco.made[:2])
    # No sentence was used twice, over four restarts.
    for organisation in (lab, telco):
        left = [made.texts_left for made in organisation.made]
        assert left == sorted(set(left), reverse=True)
    # A suspect was met again at once, and judged by own weights.
    first = next(n for n, made in enumerate(lab.made) if suspects(made, desk.evil))
    assert lab.made[first + 1].target.node == desk.evil.peer_id
    assert lab.made[first + 1].target.case is Case.SUSPECT
    for made in lab.made:
        for each in made.judged:
            evidence = each.finding.evidence
            if evidence is None:
                # Found wrong as a replica, with which a hop was compared: nothing to be shown.
                assert each.outcome is None
                assert each.finding.peer_id == desk.evil.peer_id
                assert each.finding.peer_id not in made.served.peers
            elif made.target.case is not None:
                assert evidence.is_by_reference
    # Honest nodes have clean audits, and none was accused; nobody judged its own.
    for number in range(1, 6):
        node = evil_swarm.identity(number)
        assert desk.state(node) == "active"
        for organisation in (lab, telco):
            assert set(organisation.findings_of(node)) <= {"passed"}
    assert lab.findings_of(desk.own) == []
    assert any(telco.findings_of(desk.own)) or desk.clean_audits(desk.own) == 0
    assert sum(desk.clean_audits(evil_swarm.identity(number)) for number in range(2, 6)) >= 8
    assert all(not posted.answer.startswith("refused") for posted in lab.posted + telco.posted)
    rows = desk.books.journal.db.execute(
        "SELECT COUNT(*), COUNT(DISTINCT segment || hex(signer)) FROM verdict"
    ).fetchone()
    assert rows == (len(lab.posted) + len(telco.posted),) * 2
    # Both have seen honest nodes: they share the sum of the day, and the cheat does not.
    paid = desk.books.share_uptime((int(time.time()) // 86400 + 1) * HOURS * HOUR_S)
    assert paid == POT
    assert desk.waiting(desk.evil) == 0
    assert_nothing_tells(swarm, lab, telco)
    desk.close()


async def test_a_node_that_leaves_adapters_out_is_found_by_challenges_with_them(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    whole = LlamaForCausalLM.from_pretrained(checkpoint.path)
    swarm = TinySwarm((None, Behaviour.NO_ADAPTER), checkpoint)
    # One changes less than rounding may: by the errors alone the bare model would pass.
    for name, std in (("small", SMALL), ("strange", 0.3)):
        make_adapter(whole, tmp_path / name, std=std, target_modules=["q_proj", "v_proj"])
    believed, stranger = (
        Publisher([tmp_path / name], checkpoint.revision) for name in ("small", "strange")
    )
    swarm.adapters = (*believed.hints.values(), *stranger.hints.values())
    desk = Desk(tmp_path / "books", swarm)
    earned = desk.earn(desk.evil, swarm.revision.hex())
    model = LocalModel.load(str(checkpoint.path), dtype="float32")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(swarm.nodes_running())
        for publisher in (believed, stranger):
            serving = publisher.serving(swarm.network, swarm.clock, tmp_path / "store")
            await stack.enter_async_context(serving)
        url = await stack.enter_async_context(desk.open())
        operator = await stack.enter_async_context(OperatorClient(url))
        names = (believed.identity.peer_id,)
        lab, telco = (
            Organisation(
                name, tmp_path, swarm, model, operator, has_weights=weights, publishers=names
            )
            for name, weights in (("lab", True), ("telco", False))
        )
        async with lab.running(1) as validator:
            while desk.state(desk.evil) != QUARANTINED:
                assert len(lab.made) < MOST_CHALLENGES
                await validator.once(lab.hear)
        assert desk.waiting(desk.evil) == earned
        telco.only_rechecks = True
        async with telco.running(2) as validator:
            await validator.once(telco.hear)
        assert desk.state(desk.evil) == REVOKED
        telco.only_rechecks = False
        for organisation in (telco, lab):
            await organisation.make_and_post(4)
    model.close()
    for organisation in (lab, telco):
        used = [made.served.adapter for made in organisation.made]
        assert set(used) == {"", believed.reference("small")}  # and not the stranger's
        for made in organisation.made:
            for each in made.judged:
                finding = each.finding
                cheated = finding.peer_id == desk.evil.peer_id and made.served.adapter
                assert finding.found.value == ("failed" if cheated else "passed"), finding
                if cheated and finding.evidence is not None:
                    assert finding.comparison is not None
                    assert finding.comparison.passes(SIXTEEN_BIT)
                    assert finding.evidence.is_by_reference is (organisation is lab)
    with_adapter = [
        each.finding
        for made in lab.made + telco.made
        if made.served.adapter
        for each in made.judged
        if each.finding.peer_id != desk.evil.peer_id and each.finding.evidence is not None
    ]
    references = {each.evidence.is_by_reference for each in with_adapter if each.evidence}
    assert references == {True, False}  # honest ones were looked at both ways
    for number in range(1, 6):
        assert desk.state(evil_swarm.identity(number)) == "active"
    assert_nothing_tells(swarm, lab, telco)
    desk.close()


async def test_whom_a_liar_accuses_is_freed_by_two_others(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    swarm = TinySwarm((None, None), checkpoint)
    desk = Desk(tmp_path / "books", swarm)
    desk.world.organisation("liar", may_validate=True)
    accused = evil_swarm.identity(2)
    earned = desk.earn(accused, swarm.revision.hex())
    desk.accuse(accused, "liar", swarm.revision.hex())
    assert desk.state(accused) == QUARANTINED
    model = LocalModel.load(str(checkpoint.path), dtype="float32")
    async with (
        swarm.nodes_running(),
        desk.open() as url,
        OperatorClient(url) as operator,
    ):
        lab, telco = (
            Organisation(name, tmp_path, swarm, model, operator, only_rechecks=True)
            for name in ("lab", "telco")
        )
        async with lab.running(1) as validator:
            await validator.once(lab.hear)
            (said,) = (each for each in lab.posted if each.verdict.outcome == "not_reproduced")
            assert (said.verdict.node, said.answer) == (accused.peer_id, QUARANTINED)
            # One is not enough, and lab has said what it had to say.
            assert desk.state(accused) == QUARANTINED
            assert await validator.challenge() is None
        async with telco.running(2) as other:
            await other.once(telco.hear)
        assert desk.state(accused) == ACTIVE
        assert await operator.quarantined() == []
        async with lab.running(3) as validator:
            assert await validator.challenge() is None
    model.close()
    for organisation in (lab, telco):
        met = [made for made in organisation.made if accused.peer_id in made.served.peers]
        assert len(met) == RIGHT_FOR_RECHECK
        (summary,) = (each for each in summaries(organisation.path) if each.node == accused.peer_id)
        assert summary.outcomes == {"passed": RIGHT_FOR_RECHECK - 1, "not_reproduced": 1}
    assert [each.case for each in summaries(lab.path) if each.node == accused.peer_id] == [""]
    assert desk.waiting(accused) == earned
    assert desk.clean_audits(accused) == 0
    desk.close()


def suspects(made: Challenged, node: Identity) -> bool:
    return any(
        each.finding.peer_id == node.peer_id and each.finding.found.value != "passed"
        for each in made.judged
    )


def assert_nothing_tells(swarm: TinySwarm, *organisations: Organisation) -> None:
    """What the nodes have in their books of the challenges: allowances as of any user."""
    clients = [peer for each in organisations for peer in each.clients]
    assert len(set(clients)) == len(clients)
    keys: dict[str, str] = {}
    classes = set()
    for books in swarm.books.values():
        for serial, payload in books.database.execute("SELECT serial, payload FROM allowance"):
            allowance = strict_json.parse(Allowance, payload)
            assert keys.setdefault(allowance.voucher_key, serial) == serial
            classes.add(allowance.allowance_class)
            for name in ("lab", "telco"):
                assert peer(name).encode() not in payload
                assert public(name).hex().encode() not in payload
    assert classes <= {FUNDED, LOCAL}
    assert FUNDED in classes


async def test_whom_an_organisation_may_judge(checkpoint: Checkpoint, tmp_path: Path) -> None:
    swarm = TinySwarm((None, None), checkpoint)
    desk = Desk(tmp_path / "books", swarm)
    state = ValidatorState.open(tmp_path / "state")
    stranger = Identity.generate().peer_id
    async with desk.open() as url, OperatorClient(url) as operator:
        own = Standings(operator, "lab", state, swarm.clock)
        others = Standings(operator, "telco", state, swarm.clock)
        assert not await own.may_be_judged(desk.own.peer_id)
        assert own.own == {desk.own.peer_id}
        assert await others.may_be_judged(desk.own.peer_id)
        assert await own.may_be_judged(desk.evil.peer_id)
        assert not await own.may_be_judged(stranger)  # its verdicts would be refused
        key = desk.evil.public_key_bytes.hex()
        gone = sign(Revocation(key, "retired", 0, desk.world.now), desk.evil.private_key)
        desk.books.revoke(gone, desk.world.now)
        assert await own.may_be_judged(desk.evil.peer_id)  # as it was said a moment ago
        own.forget(desk.evil.peer_id)
        assert not await own.may_be_judged(desk.evil.peer_id)
    await state.close()
    again = ValidatorState.open(tmp_path / "state")
    async with OperatorClient(url) as operator:  # it is away now
        own = Standings(operator, "lab", again, swarm.clock)
        assert not await own.may_be_judged(desk.own.peer_id)
        assert not await own.may_be_judged(desk.evil.peer_id)
        assert not await own.may_be_judged(evil_swarm.identity(3).peer_id)  # never spoken of
        assert await Standings(operator, "telco", again, swarm.clock).may_be_judged(
            desk.own.peer_id
        )
    await again.close()
    desk.close()


async def test_a_key_that_the_operator_does_not_list_is_told_so(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    desk = Desk(tmp_path / "books", TinySwarm((None, None), checkpoint))
    state = ValidatorState.open(tmp_path / "state")
    async with desk.open() as url, OperatorClient(url) as operator:
        with pytest.raises(ConfigError, match=public("mallory").hex()):
            await organisation_of(operator, party("mallory"), state)
        assert await organisation_of(operator, party("telco"), state) == "telco"
    async with OperatorClient(url) as operator:  # it is away, and has said it before
        assert await organisation_of(operator, party("telco"), state) == "telco"
    await state.close()
    desk.close()
