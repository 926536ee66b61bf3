"""The languages of the page: message files, numbers, dates and names of countries.

A message file is ``messages/LANGUAGE.json``: flat keys to texts with ``{placeholders}``; a message
that counts is an object with a text for each plural category of the language.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files

from babel import Locale
from babel.dates import format_datetime, format_timedelta
from babel.numbers import format_decimal, format_percent

LANGUAGES = ("en", "fr", "hi", "sw")
DEFAULT = "en"
NEVER = "\N{EN DASH}"
UNIT = "unit."
"""Messages for so many: ``unit.1000000`` is a million."""

Message = str | Mapping[str, str]


class Language:
    """One language: texts and formats."""

    def __init__(self, code: str, messages: Mapping[str, Message], fallback: Language | None):
        self.code = code
        self.locale = Locale.parse(code)
        self.messages = messages
        self._fallback = fallback
        self._units = sorted(
            (int(key.removeprefix(UNIT)), message)
            for key, message in messages.items()
            if key.startswith(UNIT)
        )

    @property
    def name(self) -> str:
        """In the language itself."""
        return (self.locale.get_display_name() or self.code).capitalize()

    def text(self, key: str, count: float | None = None, **values: object) -> str:
        """The message with its placeholders filled in; ``count`` chooses the plural form.

        Raises KeyError for messages that no file has.
        """
        message = self.messages.get(key)
        if message is None:
            if self._fallback is None:
                raise KeyError(key)
            return self._fallback.text(key, count, **values)
        message = _of_form(message, self.locale.plural_form(count or 0))
        if count is not None:
            values["count"] = self.number(count)
        return message.format(**values)

    def number(self, value: float, digits: int = 0) -> str:
        pattern = "#,##0." + "0" * digits if digits else "#,##0"
        if self.code == "hi":  # lakh and crore
            pattern = pattern.replace("#,##0", "#,##,##0")
        return format_decimal(round(value, digits), format=pattern, locale=self.locale)

    def amount(self, value: float) -> str:
        """A number that may be large or small, with about three digits that mean something."""
        for limit, message in reversed(self._units):
            if value >= limit:
                shown = round(value / limit, 1)
                text = _of_form(message, self.locale.plural_form(shown))
                return text.format(value=self.number(shown, int(shown % 1 > 0)))
        return self.number(value, 0 if value >= 100 or value == int(value) else 1)

    def percent(self, share: float | None) -> str:
        if share is None:
            return NEVER
        # 100 % is only what never failed.
        shown = round(min(share, 0.999) if share < 1 else share, 3)
        return format_percent(shown, locale=self.locale, decimal_quantization=False)

    def time(self, unix_s: float) -> str:
        """Date and time, UTC."""
        at = datetime.fromtimestamp(unix_s, UTC)
        return format_datetime(at, "d MMM y, HH:mm 'UTC'", locale=self.locale)

    def day(self, unix_s: float) -> str:
        return format_datetime(datetime.fromtimestamp(unix_s, UTC), "d MMMM y", locale=self.locale)

    def clock(self, unix_s: float) -> str:
        return format_datetime(datetime.fromtimestamp(unix_s, UTC), "HH:mm", locale=self.locale)

    def short_day(self, unix_s: float) -> str:
        return format_datetime(datetime.fromtimestamp(unix_s, UTC), "d MMM", locale=self.locale)

    def duration(self, seconds: float) -> str:
        return format_timedelta(round(seconds), threshold=1.4, locale=self.locale)

    def country(self, code: str) -> str:
        """The country's name; its code where the language has none."""
        name: str | None = self.locale.territories.get(code)
        return name or code

    def energy(self, joules: float) -> str:
        hours = joules / 3600
        if hours >= 1e6:
            return f"{self.number(hours / 1e6, 1)} MWh"
        if hours >= 1e3:
            return f"{self.number(hours / 1e3, 1)} kWh"
        return f"{self.number(hours, 1 if hours < 100 else 0)} Wh"

    def mass(self, grams: float) -> str:
        if grams >= 1e6:
            return f"{self.number(grams / 1e6, 1)} t"
        if grams >= 1e3:
            return f"{self.number(grams / 1e3, 1)} kg"
        return f"{self.number(grams, 1 if grams < 100 else 0)} g"


def _of_form(message: Message, form: str) -> str:
    return message if isinstance(message, str) else message.get(form) or message["other"]


def read_languages() -> dict[str, Language]:
    """All languages, from the files that come with this package."""
    folder = files("swarm.status") / "messages"
    read = {
        code: json.loads((folder / f"{code}.json").read_text(encoding="utf-8"))
        for code in LANGUAGES
    }
    default = Language(DEFAULT, read[DEFAULT], None)
    return {
        code: default if code == DEFAULT else Language(code, messages, default)
        for code, messages in read.items()
    }


def negotiated(accept_language: str) -> str:
    """The best of our languages for an ``Accept-Language`` header (RFC 9110, 12.5.4)."""
    wishes: list[tuple[float, int, str]] = []
    for place, part in enumerate(accept_language[:256].split(",")[:16]):
        tag, _, parameter = part.strip().partition(";")
        code = tag.strip().lower().partition("-")[0]
        try:
            weight = float(parameter.strip().removeprefix("q=")) if parameter else 1.0
        except ValueError:
            continue
        if code in LANGUAGES and weight > 0:
            wishes.append((-weight, place, code))
    return min(wishes)[2] if wishes else DEFAULT
