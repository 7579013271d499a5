"""The tables and bars of docs/scale.md, from reports made up here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import scale_table
from scale_table import CHUNK, SETUPS, SEVENTY_16, Row

GIB = 1 << 30


def line(kind: str, count: int, place: str = "step") -> dict[str, Any]:
    return {"kind": kind, "count": count, "place": place, "payload_bytes": 8, "group_size": 16, "sent_bytes": 7.0}


def found(**changes: Any) -> dict[str, Any]:
    """A report of one program that keeps every bar."""
    bound = {"hbm_s": 0.01, "mxu_s": 0.001, "links_s": 0.002, "bound_by": "HBM"}
    program: dict[str, Any] = {
        "roofline": {**bound, "tokens_per_s": 6400.0, "serial_tokens_per_s": 5333.0},
        "seconds": {"tracing": 1.0, "lowering": 2.0, "compiling": 20.0, "cpu": 25.0},
        "temporary_bytes": GIB // 10,
        "collectives": [line("all-reduce", 160), line("all-gather", 2), line("all-reduce", 9, "branch")],
        "sent_bytes": 3e8,
        "overlap": 0.9,
        "copies": [],
        **changes,
    }
    capacity = [{"length": length, "sequences": 5} for length in (2048, 8192)]
    sizes = dict.fromkeys(("weight_bytes", "kv_bytes", "temporary_bytes", "headroom_bytes"), GIB)
    memory = {**sizes, "limit_bytes": 32 * GIB, "capacity": capacity, "fits": True}
    return {"versions": scale_table.versions(), "memory": memory, "programs": {"x": program}}


DECODE, PREFILL = Row(SEVENTY_16, 64, 8192, 0), Row(SEVENTY_16, 8, CHUNK, CHUNK)


def test_every_bar_of_a_good_report_is_kept() -> None:
    checked = scale_table.bars({DECODE: found(), PREFILL: found()})
    assert [bar.kept for bar in checked] == [True] * 5
    assert "**missed**" not in scale_table.bars_table(checked)


@pytest.mark.parametrize(
    ("row", "changes", "what", "value"),
    [
        (DECODE, {"copies": [{"argument": "parameters[3]"}]}, "copies of weights", "parameters[3]"),
        (DECODE, {"collectives": [line("all-reduce", 162)]}, "all-reduces of a step", "162"),
        (DECODE, {"temporary_bytes": GIB}, "temporaries", "3.12%"),
        (DECODE, {"seconds": {"tracing": 1.0, "lowering": 1.0, "compiling": 24.0}}, "time to compile", "26 s"),
        (PREFILL, {"overlap": 0.79}, "bytes sent beside products", "79%"),
        (PREFILL, {"overlap": None}, "bytes sent beside products", "0%"),
    ],
)
def test_a_bar_that_is_missed_is_marked(row: Row, changes: dict[str, Any], what: str, value: str) -> None:
    [missed] = [bar for bar in scale_table.bars({row: found(**changes)}) if not bar.kept]
    assert what in missed.what and missed.found == value
    assert "**missed**" in scale_table.bars_table([missed])


def test_a_program_that_the_compiler_refused_with_all_its_pages_is_marked() -> None:
    """By the sum it would fit."""
    refused = found()
    refused["memory"]["fits"] = False
    cells = [scale_table.memory_cells(DECODE, each)[-2] for each in (found(), refused)]
    assert cells == ["1.00", "1.00, and refused"]


def test_large_temporaries_of_any_decode_program_are_named() -> None:
    row = Row(SETUPS[0], 64, 2048, 0)
    [missed] = scale_table.bars({row: found(temporary_bytes=GIB)})
    assert not missed.kept and missed.what == "llama-3.1-8b, bfloat16, v5e:2x2, decode 64 x 2,048: temporaries"
    assert scale_table.bars({row: found()}) == []
    assert scale_table.bars({Row(SETUPS[0], 8, CHUNK, CHUNK): found(temporary_bytes=GIB)}) == []


def test_the_models_and_slices_of_the_table() -> None:
    keys = [row.key for setup in SETUPS for row in scale_table.rows_of(setup)]
    assert len(set(keys)) == len(keys)
    for wanted in (
        *(
            "8b_bfloat16_v5e-2x2",
            "8b_bfloat16_v6e-1x1",
            "70b_bfloat16_v5e-4x4",
            "70b_bfloat16_v6e-2x4",
            "70b_int8_v5e-2x4",
        ),
        *("405b_int8_v5p-4x4x4", "235b-a22b_bfloat16_tpu7x", "mixtral-8x7b_bfloat16_v6e-2x4"),
    ):
        mine = [key for key in keys if wanted in key]
        assert [any(f"decode_{batch}_" in key for key in mine) for batch in (1, 64, 256)] == [True] * 3
        assert any(f"prefill{CHUNK}" in key for key in mine)


def test_what_was_made_is_reused_and_a_missed_bar_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def report(row: Row, say: object) -> dict[str, Any]:
        made.append(row.key)
        return found(overlap=0.5)

    page = tmp_path / "scale.md"
    page.write_text(
        "".join(f"<!-- begin {part} -->\nold\n<!-- end {part} -->\n" for part in ("bars", "memory", "speed"))
    )
    monkeypatch.setattr(scale_table, "made", report)
    monkeypatch.setattr(scale_table, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(scale_table, "PAGE", page)
    monkeypatch.setattr(scale_table, "SETUPS", (SEVENTY_16,))
    monkeypatch.setattr(sys, "argv", ["scale_table.py"])
    assert scale_table.main() == 1
    assert len(made) == len(scale_table.rows_of(SEVENTY_16)) == 4
    assert "old" not in page.read_text() and page.read_text().count("**missed**") == 1
    assert "160 all-reduce, 2 all-gather" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["scale_table.py", "--reuse", "--print", "--only", "decode_64"])
    assert scale_table.main() == 0
    assert len(made) == 4
    kept = tmp_path / "kept" / f"{DECODE.key}.json"
    kept.write_text(json.dumps(found(error="RESOURCE_EXHAUSTED: too much")))
    capsys.readouterr()
    assert scale_table.main() == 1
    assert "**RESOURCE_EXHAUSTED: too much**" in capsys.readouterr().out
    kept.write_text(json.dumps(found() | {"versions": {"jax": "0.1", "libtpu": "0.1"}}))
    assert scale_table.main() == 0 and len(made) == 5  # what another compiler said is not taken


def test_a_part_of_the_tables_does_not_go_into_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scale_table.py", "--only", "70b"])
    with pytest.raises(SystemExit):
        scale_table.main()
