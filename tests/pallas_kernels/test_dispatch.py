"""How an operation's backend is chosen, forced and explained."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from pallas_kernels import devices
from pallas_kernels.dispatch import BackendError, Op

CPU = devices.named("cpu")


def make_backend(monkeypatch: pytest.MonkeyPatch, module_name: str, most_rows: int) -> None:
    module = ModuleType(module_name)
    module.refuse = lambda *, rows, device: None if rows <= most_rows else f"{rows} rows are more than {most_rows}"
    monkeypatch.setitem(sys.modules, module_name, module)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Op:
    """Two backends: `narrow` takes up to 4 rows, `wide` up to 8. Named after the test: choices are logged once."""
    make_backend(monkeypatch, "fake_narrow", 4)
    make_backend(monkeypatch, "fake_wide", 8)
    return Op(name=request.node.name, backends={"narrow": "fake_narrow", "wide": "fake_wide"})


def test_auto_takes_the_first_willing(op: Op) -> None:
    assert op.choose("auto", rows=4, device=CPU) == ("narrow", sys.modules["fake_narrow"])
    assert op.choose("auto", rows=5, device=CPU) == ("wide", sys.modules["fake_wide"])


def test_auto_without_a_willing_backend_gives_every_reason(op: Op) -> None:
    with pytest.raises(BackendError, match=r"rows=9, device=cpu: narrow: 9 rows are more than 4; wide: 9 rows are"):
        op.choose("auto", rows=9, device=CPU)


def test_forced_backend_is_used(op: Op) -> None:
    assert op.choose("wide", rows=1, device=CPU)[0] == "wide"


def test_forced_backend_that_refuses_names_what_would_work(op: Op) -> None:
    with pytest.raises(
        BackendError,
        match=r"'narrow' refuses rows=6, device=cpu: 6 rows .* than 4 \(what would work: auto, wide\)",
    ):
        op.choose("narrow", rows=6, device=CPU)


def test_forced_backend_where_none_works(op: Op) -> None:
    with pytest.raises(BackendError, match="no other backend takes it either"):
        op.choose("narrow", rows=9, device=CPU)


def test_unknown_backend_lists_the_choices(op: Op) -> None:
    with pytest.raises(BackendError, match="'cuda' is not one of auto, narrow, wide"):
        op.choose("cuda", rows=1, device=CPU)


def test_a_choice_is_logged_once_per_case_with_the_refusals(op: Op, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pallas_kernels.dispatch"):
        for rows in (6, 6, 7):
            op.choose("auto", rows=rows, device=CPU)
    assert [record.getMessage() for record in caplog.records] == [
        f"{op.name} (rows=6, device=cpu): wide; refused by narrow: 6 rows are more than 4",
        f"{op.name} (rows=7, device=cpu): wide; refused by narrow: 7 rows are more than 4",
    ]


def test_a_backend_is_imported_on_use_only() -> None:
    op = Op(name="lazy", backends={"good": "fake_good_that_is_missing"})
    with pytest.raises(ModuleNotFoundError, match="fake_good_that_is_missing"):
        op.choose("good", rows=1, device=CPU)


def test_a_backend_for_other_platforms_refuses_without_being_imported(op: Op) -> None:
    elsewhere = replace(
        op, backends={"far": "fake_far_that_is_missing", **op.backends}, platforms={"far": ("cuda", "rocm")}
    )
    assert elsewhere.choose("auto", rows=4, device=CPU)[0] == "narrow"
    with pytest.raises(BackendError, match=r"it is for cuda and rocm, the device is cpu .*: auto, narrow, wide"):
        elsewhere.choose("far", rows=4, device=CPU)


def test_refusals_asks_everyone(op: Op) -> None:
    assert op.refusals(rows=5, device=CPU) == {"narrow": "5 rows are more than 4", "wide": None}
