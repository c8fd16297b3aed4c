"""When a recurring run starts: six fields, as KFP's robfig/cron (v1.2.0) reads them.

KFP takes five fields as well, and reads them as seconds, minutes, hours …: `0 3 * * *` would be each hour at
three minutes past. So five are refused here. Which zone they are of, no cron says: it is that of KFP's
controller.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from model.errors import UserError

YEARS = 5  # after which a time that has not come is taken for one that never does, as KFP does
EXAMPLE = "0 0 3 * * *"
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()  # that stand for `low` and on


FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day", 1, 31),
    _Field("month", 1, 12, MONTHS),
    _Field("weekday", 0, 6, DAYS),
)


class Cron:
    """The times that a cron names."""

    def __init__(self, text: str) -> None:
        """
        Args:
            text: second, minute, hour, day, month, weekday.

        Raises:
            UserError: it is not of that form; says which would be right.
        """
        fields = text.split()
        if len(fields) == 5 and not fields[0].startswith(("@", "TZ=")):
            raise UserError(
                f"cron '{text}' has five fields; KFP's begin with seconds: write '0 {' '.join(fields)}'"
            )
        if len(fields) != len(FIELDS):
            names = ", ".join(field.name for field in FIELDS)
            raise UserError(f"cron '{text}' must have six fields ({names}), e.g. '{EXAMPLE}'")
        self.text = " ".join(fields)
        self._taken = [_values(text, field) for text, field in zip(fields, FIELDS, strict=True)]
        # Day and weekday have both to fit where one of them is left open, else one is enough.
        self._both = any(
            part[0] in "*?" for text in (fields[3], fields[5]) for part in text.split(",") if part
        )
        if self.after(datetime.now(UTC), ZoneInfo("UTC"), 1) == []:
            raise UserError(f"cron '{text}' names a time that never comes")

    def after(self, moment: datetime, zone: ZoneInfo, count: int) -> list[datetime]:
        """The next times after a moment, in a zone; fewer where no more come within five years each."""
        found: list[datetime] = []
        while len(found) < count and (next_ := self._next(moment, zone)):
            found.append(next_)
            moment = next_
        return found

    def _next(self, moment: datetime, zone: ZoneInfo) -> datetime | None:
        now = moment.astimezone(UTC).replace(microsecond=0) + timedelta(seconds=1)
        seconds, minutes, hours = self._taken[:3]
        last = now.year + YEARS
        while True:
            local = now.astimezone(zone)
            if local.year > last:
                return None
            if not (self._is_day(local) and local.hour in hours):  # clocks are changed on quarters of an hour
                now += timedelta(seconds=900 - (local.minute * 60 + local.second) % 900)
            elif local.minute not in minutes:
                now += timedelta(seconds=60 - local.second)
            elif local.second not in seconds:
                now += timedelta(seconds=1)
            else:
                return local

    def _is_day(self, local: datetime) -> bool:
        *_, days, months, weekdays = self._taken
        fits = (local.day in days, local.isoweekday() % 7 in weekdays)
        return local.month in months and (all(fits) if self._both else any(fits))


def zone_of(name: str) -> ZoneInfo:
    """A zone by its name, e.g. Europe/Berlin. Raises UserError: there is none."""
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        raise UserError(f"there is no zone '{name}'; e.g. UTC or Europe/Berlin is one") from None


def _values(text: str, field: _Field) -> set[int]:
    """The values that a field takes, of comma-separated `*`, `a`, `a-b`, each with `/step`."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(?:[*?](?:-[^/-]*)?|([^/*?-]+)(?:-([^/-]+))?)(?:/(\+?[0-9]+))?", part)
        if not match:
            raise UserError(f"cron: {field.name} '{part}' must read like 5, 1-5, * or */10")
        low, high, step = match[1], match[2], match[3]
        first = _number(low, field, part) if low else field.low
        last = _number(high, field, part) if high else first if low and not step else field.high
        if not field.low <= first <= last <= field.high or (step and not int(step)):
            raise UserError(f"cron: {field.name} '{part}' must lie within {field.low}-{field.high}")
        found.update(range(first, last + 1, int(step or 1)))
    return found


def _number(text: str, field: _Field, part: str) -> int:
    if text.lower() in field.names:
        return field.low + field.names.index(text.lower())
    if not re.fullmatch(r"\+?[0-9]{1,9}", text):
        raise UserError(f"cron: {field.name} '{part}' is no number" + (" or name" if field.names else ""))
    return int(text)
