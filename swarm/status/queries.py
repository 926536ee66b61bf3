"""What readers ask of the list of nodes: search, order, page; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from swarm.status.snapshot import NodeStatus, Snapshot

NODES_PER_PAGE = 50
MOST_TEXT = 64
ORDERS = ("blocks", "name", "speed", "uptime")


@dataclass(frozen=True, slots=True)
class NodeQuery:
    """A search, as in the address of the page."""

    text: str = ""
    model: str = ""
    sort: str = "blocks"
    page: int = 1

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> NodeQuery:
        """Whatever an address says; what makes no sense is left out."""
        page = parameters.get("page", "1")
        sort = parameters.get("sort", "")
        return cls(
            text=parameters.get("q", "").strip()[:MOST_TEXT],
            model=parameters.get("model", "")[:MOST_TEXT],
            sort=sort if sort in ORDERS else ORDERS[0],
            page=int(page) if page.isascii() and page.isdigit() and 0 < len(page) < 7 else 1,
        )

    def address(self, **changes: int) -> str:
        """As ``q=...&page=2``; empty when it asks for nothing special."""
        query = replace(self, **changes)  # type: ignore[arg-type]
        wanted = {"q": query.text, "model": query.model, "sort": query.sort, "page": query.page}
        usual = {"q": "", "model": "", "sort": ORDERS[0], "page": 1}
        return urlencode({key: value for key, value in wanted.items() if value != usual[key]})


@dataclass(frozen=True, slots=True)
class NodePage:
    """A part of what a query finds."""

    query: NodeQuery
    nodes: Sequence[NodeStatus]
    total: int
    pages: int


def find_nodes(snapshot: Snapshot, query: NodeQuery, country_names: Mapping[str, str]) -> NodePage:
    """The page of a query; a page beyond the last one is the last one."""
    found: Sequence[NodeStatus] = snapshot.nodes
    if query.model:
        found = [node for node in found if node.revision == query.model]
    if query.text:
        wanted = query.text.casefold()
        countries = {
            code
            for code, name in country_names.items()
            if wanted in (name.casefold(), code.casefold())
        }
        found = [
            node
            for node in found
            if wanted in node.name.casefold()
            or wanted in node.organisation.casefold()
            or node.country in countries
            or node.peer_id.endswith(query.text)
        ]
    match query.sort:
        case "name":
            found = sorted(found, key=lambda node: (node.name == "", node.name.casefold()))
        case "speed":
            found = sorted(found, key=lambda node: -node.tokens_per_s)
        case "uptime":
            found = sorted(found, key=lambda node: -(node.uptime_30d or 0.0))
    pages = max(1, -(-len(found) // NODES_PER_PAGE))
    query = replace(query, page=min(query.page, pages))
    first = (query.page - 1) * NODES_PER_PAGE
    return NodePage(query, found[first : first + NODES_PER_PAGE], len(found), pages)
