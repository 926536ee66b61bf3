"""Incidents as an Atom feed (RFC 4287); pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from uuid import NAMESPACE_URL, uuid5
from xml.etree.ElementTree import Element, SubElement, tostring

from swarm.status.languages import Language
from swarm.status.snapshot import Incident, Snapshot

ATOM = "http://www.w3.org/2005/Atom"
MOST_ENTRIES = 50


def incident_feed(
    snapshot: Snapshot,
    language: Language,
    swarm_name: str,
    origin: str,
    describe: Callable[[Incident], str],
) -> bytes:
    """An entry for each incident; it is updated when the incident is over.

    ``origin`` is the page's own address, as ``https://status.example.org``; identifiers do not
    depend on it, since a feed may move.
    """
    feed = Element("feed", {"xmlns": ATOM, "xml:lang": language.code})
    page = f"{origin}/{language.code}/incidents"
    SubElement(feed, "title").text = f"{swarm_name}: {language.text('incident.heading')}"
    SubElement(feed, "id").text = _identifier(swarm_name, language.code)
    SubElement(feed, "link", {"rel": "self", "href": f"{page}.atom"})
    SubElement(feed, "link", {"rel": "alternate", "type": "text/html", "href": page})
    author = SubElement(feed, "author")
    SubElement(author, "name").text = swarm_name
    latest = max((_updated(item) for item in snapshot.incidents), default=snapshot.taken_unix_s)
    SubElement(feed, "updated").text = _timestamp(latest)
    for incident in snapshot.incidents[:MOST_ENTRIES]:
        entry = SubElement(feed, "entry")
        SubElement(entry, "title").text = describe(incident)
        own = f"{incident.number}/{incident.opened_unix_s}"
        SubElement(entry, "id").text = _identifier(swarm_name, language.code, own)
        SubElement(entry, "link", {"rel": "alternate", "type": "text/html", "href": page})
        SubElement(entry, "published").text = _timestamp(incident.opened_unix_s)
        SubElement(entry, "updated").text = _timestamp(_updated(incident))
        SubElement(entry, "summary").text = _when(incident, language)
    body: bytes = tostring(feed, encoding="utf-8", xml_declaration=True)
    return body


def _when(incident: Incident, language: Language) -> str:
    begin = language.time(incident.opened_unix_s)
    if incident.closed_unix_s is None:
        return f"{language.text('incident.open')}, {language.text('incident.since', time=begin)}"
    lasted_s = incident.closed_unix_s - incident.opened_unix_s
    if not lasted_s:
        return begin
    return language.text("incident.lasted", begin=begin, duration=language.duration(lasted_s))


def _updated(incident: Incident) -> float:
    closed = incident.closed_unix_s
    return incident.opened_unix_s if closed is None else closed


def _identifier(*parts: str) -> str:
    return uuid5(NAMESPACE_URL, "/".join(("sovereign-swarm incidents", *parts))).urn


def _timestamp(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
