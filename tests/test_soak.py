"""The soak's judgement: it must see what it is there to see, and nothing else."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from soak_checks import Disturbance, judge, lost


def entries(*pairs: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"event": event, "step": step} for event, step in pairs]


@pytest.mark.parametrize(
    ("journal", "bad_lines"),
    [
        ([("started", 0), ("saved", 20), ("stopped", 33), ("started", 33)], []),
        ([("started", 0), ("saved", 20), ("saved", 33), ("stopped", 33), ("started", 20)], [5]),
        ([("started", 0), ("stopped", 33), ("started", 40)], [3]),  # a stop leaves nothing unnoted
        ([("started", 0), ("saved", 20), ("started", 20)], []),
        ([("started", 0), ("saved", 20), ("started", 40)], []),  # killed between the checkpoint and its line
        ([("started", 0), ("saved", 20), ("started", 60)], [3]),
        ([("started", 0), ("saved", 20), ("failed", 33), ("started", 0)], [4]),
        ([("started", 20)], []),
        ([("started", 0), ("saved", 20), ("started", 40), ("started", 20)], [4]),
    ],
)
def test_starts_that_do_not_go_on_where_the_run_had_come(journal: list[tuple[str, int]], bad_lines: list[int]) -> None:
    found = [int(what.split()[1]) for what in lost(entries(*journal))]
    assert found == bad_lines


@pytest.mark.parametrize(
    ("kind", "ranks", "ready", "code", "journal", "wrong"),
    [
        ("SIGTERM", [0], True, 75, [("started", 0), ("saved", 33), ("stopped", 33)], ""),
        ("SIGTERM", [0], True, 75, [("started", 20), ("stopped", 20)], ""),
        ("SIGTERM", [0], True, 75, [], ""),
        ("SIGTERM", [0], True, 1, [], "its exit code is 1, not 75"),
        ("SIGTERM", [0], False, -15, [], ""),
        ("SIGTERM", [0], True, -15, [], "its exit code is -15, not 75"),
        ("SIGINT", [0, 1], True, 75, [], "its exit code is 75, not 130"),
        ("SIGUSR1", [1], True, 75, [("started", 0), ("saved", 20)], "it was asked to stop, and its journal ends with"),
        ("SIGUSR1", [1], True, 75, [("started", 0), ("failed", 9), ("stopped", 9)], "it was asked to stop"),
        ("SIGUSR1", [1], True, 75, [("started", 0), ("saved", 20), ("stopped", 33)], "it stopped at step 33, and"),
        ("SIGUSR1", [1], True, 0, [("started", 0), ("finished", 33)], "its exit code is 0"),
        ("SIGKILL", [0, 1], False, -9, [("started", 0)], ""),
        ("SIGKILL", [0], False, -9, [("started", 0), ("failed", 7)], ""),
        ("SIGKILL", [0], False, -9, [("started", 0)], "no line of its journal says which rank was lost"),
        ("SIGKILL", [1], False, 1, [("started", 0), ("failed", 7)], ""),
        ("SIGKILL", [1], False, 75, [("started", 0), ("failed", 7)], "its exit code is 75, not 1"),
        ("SIGKILL", [1], False, -9, [], ""),
        ("SIGKILL", [1], False, 0, [], "its exit code is 0, not -9 or 1"),
        ("SIGKILL", [1], False, 1, [("started", 0), ("failed", 7), ("stopped", 7)], "it was killed, and its journal"),
        ("SIGSTOP", [1], False, 1, [("started", 0), ("failed", 7)], ""),
        ("SIGSTOP", [1], False, 75, [("started", 0), ("failed", 7)], "its exit code is 75, not 1"),
    ],
)
def test_how_a_start_ends(
    kind: str, ranks: list[int], ready: bool, code: int, journal: list[tuple[str, int]], wrong: str
) -> None:
    found = list(judge(Disturbance(kind, ranks, ready, code, journal)))
    assert any(what.startswith(wrong) for what in found) if wrong else not found, found
