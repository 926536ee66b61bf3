"""Turns a snapshot into HTML: one method for each page. Everything in a template is escaped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from swarm.status.badges import donor_badge
from swarm.status.block_map import BlockCell, block_cells
from swarm.status.carbon import GridFactors
from swarm.status.charts import Axes, Point, bar_chart, line_chart
from swarm.status.history import DAY, History
from swarm.status.languages import LANGUAGES, NEVER, Language, read_languages
from swarm.status.leaderboard import leaderboard
from swarm.status.queries import NodeQuery, find_nodes
from swarm.status.rows import DAY_S
from swarm.status.snapshot import Incident, ModelStatus, NodeStatus, Probe, Snapshot, Work

STATIC_FILES = {
    "style.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "mark.svg": "image/svg+xml",
}
CURVES = ("nodes", "tokens", "least", "first_token", "probed_speed")
COUNTED = frozenset({"nodes", "least"})
"""Curves of whole things."""
MOST_MODEL_NODES = 20
SHOWN_DAYS = 30


@dataclass(frozen=True, slots=True)
class Chart:
    """A title and its picture; no picture where there are no data."""

    title: str
    svg: Markup | None


class Pages:
    """All pages in all languages; holds templates and nothing that changes."""

    def __init__(
        self, swarm_name: str, factors: GridFactors, *, peers: str, origin: str = ""
    ) -> None:
        """``origin``: the page's public address for feeds and badges, as ``https://status.org``."""
        self.languages = read_languages()
        self.swarm_name = swarm_name
        self.origin = origin
        self._peers = peers
        self._factors = factors
        folder = files("swarm.status") / "static"
        self.static = {name: (folder / name).read_bytes() for name in STATIC_FILES}
        digest = hashlib.sha256(b"".join(self.static.values()))
        self._assets = digest.hexdigest()[:12]
        self._templates = Environment(
            loader=PackageLoader("swarm.status"),
            autoescape=True,
            auto_reload=False,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    # --- the pages -------------------------------------------------------------------------------
    def overview(
        self, snapshot: Snapshot, code: str, stale: bool, histories: Sequence[History]
    ) -> str:
        language = self.languages[code]
        day, month = (self._charts(history, language) for history in histories)
        return self._render(
            "overview.html", snapshot, language, stale, "/", "overview", day=day, month=month
        )

    def model(
        self,
        snapshot: Snapshot,
        code: str,
        stale: bool,
        model: ModelStatus,
        histories: Sequence[History],
    ) -> str:
        language = self.languages[code]
        day, month = (self._charts(history, language) for history in histories)
        own = [node for node in snapshot.nodes if node.revision == model.revision]
        return self._render(
            "model.html",
            snapshot,
            language,
            stale,
            f"/models/{model.revision}",
            "overview",
            model=model,
            nodes=own[:MOST_MODEL_NODES],
            total=len(own),
            several=False,
            day=day,
            month=month,
        )

    def nodes(self, snapshot: Snapshot, code: str, stale: bool, query: NodeQuery) -> str:
        language = self.languages[code]
        page = find_nodes(snapshot, query, language.locale.territories)

        def link(number: int) -> str:
            address = page.query.address(page=number)
            return f"/{code}/nodes" + (f"?{address}" if address else "")

        address = page.query.address()
        return self._render(
            "nodes.html",
            snapshot,
            language,
            stale,
            "/nodes" + (f"?{address}" if address else ""),
            "nodes",
            query=page.query,
            nodes=page.nodes,
            total=page.total,
            pages=page.pages,
            several=len(snapshot.models) > 1,
            link=link,
        )

    def donor(
        self,
        snapshot: Snapshot,
        code: str,
        stale: bool,
        nodes: Sequence[NodeStatus],
        days: Mapping[int, Work],
    ) -> str:
        language = self.languages[code]
        work = sum((node.work for node in nodes), Work())
        today = int(snapshot.taken_unix_s) // DAY_S
        bars = [
            (language.short_day(day * DAY_S), days.get(day, Work()).tokens)
            for day in range(today - SHOWN_DAYS + 1, today + 1)
        ]
        axes = Axes(0.0, 1.0, 1.0, 6, language.short_day, language.amount)
        return self._render(
            "donor.html",
            snapshot,
            language,
            stale,
            f"/donors/{nodes[0].peer_id}",
            "donors",
            node=nodes[0],
            nodes=nodes,
            work=work,
            days=bar_chart(bars, axes, language.text("donor.days")) if days else None,
            badge_text=language.text("badge.tokens", tokens=language.amount(work.tokens)),
            origin=self.origin,
        )

    def certificate(
        self, snapshot: Snapshot, code: str, stale: bool, nodes: Sequence[NodeStatus]
    ) -> str:
        return self._render(
            "certificate.html",
            snapshot,
            self.languages[code],
            stale,
            f"/donors/{nodes[0].peer_id}/certificate",
            "donors",
            node=nodes[0],
            work=sum((node.work for node in nodes), Work()),
        )

    def badge(self, code: str, nodes: tuple[NodeStatus, ...]) -> str:
        return str(donor_badge(nodes, self.languages[code], self.swarm_name))

    def donors(
        self, snapshot: Snapshot, code: str, stale: bool, settled: Mapping[str, float] | None
    ) -> str:
        board = leaderboard(snapshot.nodes, settled)
        return self._render(
            "donors.html",
            snapshot,
            self.languages[code],
            stale,
            "/donors",
            "donors",
            nodes=board.nodes,
            organisations=board.organisations,
            settled=board.settled,
        )

    def incidents(self, snapshot: Snapshot, code: str, stale: bool) -> str:
        return self._render(
            "incidents.html", snapshot, self.languages[code], stale, "/incidents", "incidents"
        )

    def about(self, snapshot: Snapshot, code: str, stale: bool) -> str:
        language = self.languages[code]
        factors = sorted(
            (language.country(country), factor) for country, factor in self._factors.factors.items()
        )
        return self._render(
            "about.html", snapshot, language, stale, "/about", "about", factors=factors
        )

    def error(self, snapshot: Snapshot, code: str, stale: bool, key: str) -> str:
        language = self.languages[code]
        return self._render(
            "error.html", snapshot, language, stale, "/", "", message=language.text(key)
        )

    def incident_text(self, incident: Incident, language: Language) -> str:
        """An incident in one sentence."""
        detail = incident.detail
        kind = incident.kind
        if kind == "probe_failing":
            detail = language.text(f"problem.{detail}")
        elif kind == "blocks_missing" and detail.isdigit():
            kind = "block_missing"
        return language.text(f"incident.{kind}", model=incident.model_name, detail=detail)

    # --- parts -----------------------------------------------------------------------------------
    def _render(
        self,
        template: str,
        snapshot: Snapshot,
        language: Language,
        stale: bool,
        here: str,
        section: str,
        **values: Any,
    ) -> str:
        """``here``: the page's address without its language."""

        def cells(model: ModelStatus) -> tuple[BlockCell, ...]:
            return block_cells(model.replicas)

        def hops(probe: Probe) -> str:
            return " → ".join(hop.name or f"…{hop.peer_id[-8:]}" for hop in probe.hops) or NEVER

        return self._templates.get_template(template).render(
            snapshot=snapshot,
            language=language,
            languages={code: self.languages[code] for code in LANGUAGES},
            t=language.text,
            stale=stale,
            here=here,
            section=section,
            swarm_name=self.swarm_name,
            assets=self._assets,
            peers=self._peers,
            cells=cells,
            hops=hops,
            incident_text=lambda incident: self.incident_text(incident, language),
            **values,
        )

    def _charts(self, history: History, language: Language) -> list[Chart]:
        axes = Axes(
            history.end_unix_s - history.range.span_s,
            history.end_unix_s,
            history.range.bin_s,
            6,
            language.clock if history.range is DAY else language.short_day,
            language.amount,
        )
        span = language.text(f"history.{history.range.name}")
        charts = []
        for name in CURVES:
            points = history.curves.get(name)
            if points is None and name not in ("nodes", "tokens"):
                continue
            title = language.text(f"history.{name}")
            charts.append(Chart(title, _picture(name, points, axes, title, span, language)))
        return charts


def _picture(
    name: str,
    points: tuple[Point, ...] | None,
    axes: Axes,
    title: str,
    span: str,
    language: Language,
) -> Markup | None:
    if not points:
        return None
    values = [value for _, value in points]
    summary = language.text(
        "history.summary",
        title=title,
        range=span,
        now=language.amount(values[-1]),
        low=language.amount(min(values)),
        high=language.amount(max(values)),
    )
    return line_chart(points, axes, summary, whole=name in COUNTED)
