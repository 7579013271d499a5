"""Which programs the first of several hosts announces before it calls them. All around the runner are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jaxinfer import runner
from jaxinfer.program_shapes import Shape
from jaxinfer.runner import Runner
from sharding.control import Kind, Message
from sharding.hosts import HostsError


class FakePrograms:
    """One program is compiled at warm-up, others when asked for."""

    def __init__(self, blueprint: Any):
        self.compiled: set[Shape] = set()

    def declared(self) -> list[Shape]:
        return [Shape(4)]

    def warm_up(self, progress: Any) -> None:
        self.compiled.update(self.declared())

    def get(self, shape: Shape) -> Shape:
        self.compiled.add(shape)
        return shape


class FakeGroup:
    """The first host's; another one fails to compile as many times as `failures` says."""

    is_leader = True

    def __init__(self, failures: int = 0):
        self.prepared: list[Message] = []
        self.failures = failures
        self.awaited: list[str] = []

    def together(self, what: str, work: Callable[[], Any]) -> Any:
        self.awaited.append(what)
        return work()

    def prepare(self, message: Message, work: Callable[[], Any]) -> Any:
        self.prepared.append(message)
        work()
        if self.failures:
            self.failures -= 1
            raise HostsError("no room to compile on host 1")


def runner_of(group: FakeGroup | None, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(runner, "Programs", FakePrograms)
    blueprint: Any = SimpleNamespace(empty_state=lambda: None)
    return Runner(blueprint, (), group)


def test_a_program_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group = FakeGroup()
    lead = runner_of(group, monkeypatch)
    for shape in (Shape(4, 64), Shape(4, 64), Shape(0, 64, "scores"), Shape(4, 64)):
        assert lead.prepare(shape) == shape
    asked = [(m.kind, m.num_slots, m.prefill_tokens, m.reader) for m in group.prepared]
    assert asked == [(Kind.PREPARE, 4, 64, ""), (Kind.PREPARE, 0, 64, "scores")]


def test_what_warm_up_compiled_is_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    group = FakeGroup()
    lead = runner_of(group, monkeypatch)
    lead.warm_up()
    lead.prepare(Shape(4))
    assert group.awaited == ["warm-up"] and not group.prepared


def test_what_another_host_could_not_compile_is_announced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although this host has it: the others would compile it inside a collective that does not wait for them."""
    group = FakeGroup(failures=1)
    lead = runner_of(group, monkeypatch)
    with pytest.raises(HostsError):
        lead.prepare(Shape(4))
    assert lead.programs.compiled == {Shape(4)}
    lead.prepare(Shape(4))
    lead.prepare(Shape(4))
    assert len(group.prepared) == 2


def test_alone_nothing_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    lone = runner_of(None, monkeypatch)
    lone.warm_up()
    assert lone.prepare(Shape(2)) == Shape(2)
