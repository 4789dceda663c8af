"""What `edgert ps` prints of what hosts say."""

from __future__ import annotations

from edgert.cli.ps import table

ADDRESS = "fe80-0000-0000-0000-0000.a-rather-long-name.example:7411"


def facts(**changes: object) -> dict[str, object]:
    part = {
        "part": "s1", "has": "layers 4 to 8, groups 2 to 4 of 4, vocabulary 0 to 16384, head",
        "attached": True, "n_tokens": 1200, "busy_s": 12.0, "exchange_s": 3.0,
    }  # fmt: skip
    return {
        "host": "w1", "state": "serving", "up_s": 7200.0, "memory_bytes": 2 * 10**10,
        "taken_bytes": 9 * 10**6, "sessions": [{"peer": "home", "parts": [part | changes]}],
    }  # fmt: skip


def test_rates_and_sessions_are_shown_in_80_columns() -> None:
    lines = table({"w1": facts(), "w2": facts()}, {"w1": ADDRESS, "w2": ADDRESS})
    text = " ".join(" ".join(lines).split())
    assert "serving, 9.00 MB of 20.0 GB taken, 1 session, up 2 h" in text
    assert "s1 for home: layers 4 to 8" in text
    assert "1,200 tokens, 100.0 tokens/s, 25 % in exchanges" in text
    assert max(map(len, lines)) <= 80


def test_a_part_without_a_link_or_work_says_so() -> None:
    (*_, last) = table({"w1": facts(attached=False, n_tokens=0, busy_s=0.0)}, {"w1": "h:1"})
    assert last.strip() == "0 tokens, idle, not attached"


def test_a_host_that_is_gone_is_told_with_the_cause() -> None:
    gone: dict[str, object] = {"state": "unreachable", "error": "w1 (h:1): cannot connect"}
    assert table({"w1": gone}, {"w1": "h:1"}) == ["w1 at h:1: unreachable", "  cannot connect"]


def test_nothing_that_a_host_says_reaches_the_terminal_as_control() -> None:
    strange = {"host": 3, "state": "\x1b[2J", "sessions": [5, {"parts": [{"has": "\x07"}, 7]}]}
    text = "".join(table({"w1": strange}, {"w1": "h:1"}))
    assert text.isprintable()
