"""The device side of an engine: weights, device state and programs, and what of them is called with the host's buffers.

Hides meshes, and that the arrays may be spread over processes: every process makes the same calls in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.batch import DeviceState
from jaxinfer.blueprint import Blueprint
from jaxinfer.outcome import Outcome
from jaxinfer.plan import Plan
from jaxinfer.programs import Program, Programs, Shape
from sharding.control import Kind, Message
from sharding.group import Group
from sharding.host_arrays import to_devices

KEPT_CALLS = 3  # whose hidden rows may still be asked for: two in flight, and the one that is being read


class Runner:
    """Not thread-safe, but for warming up `programs`."""

    def __init__(self, blueprint: Blueprint, parameters: tuple[jax.Array, ...], group: Group | None = None):
        """`group`: of hosts; the first one's runner tells the others' what it does, and theirs `obey`."""
        self.blueprint = blueprint
        self._group = group
        self._followers = group if group is not None and group.is_leader else None
        self.parameters = parameters
        self.state: DeviceState = blueprint.empty_state()
        self.programs = Programs(blueprint)
        self._everywhere: set[Shape] = set()  # programs that every host has
        self._hidden: deque[tuple[int, jax.Array]] = deque(maxlen=KEPT_CALLS)  # by call: a mixed step's hidden rows

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile the declared programs; over several hosts, return when all of them have."""
        if self._group is None:
            self.programs.warm_up(progress)
        else:
            self._group.together("warm-up", lambda: self.programs.warm_up(progress))
            self._everywhere.update(self.programs.declared())

    def prepare(self, shape: Shape) -> Program:
        """The program of a shape; a new one is compiled on every host before any calls it.

        Hosts compile at their own pace, and a collective does not wait for the slowest (gloo gives up after 30 s).
        """
        if self._followers is not None and shape not in self._everywhere:
            message = Message(Kind.PREPARE, shape.num_slots, shape.prefill_tokens, shape.reader)
            self._followers.prepare(message, lambda: self.programs.get(shape))
            self._everywhere.add(shape)
        return self.programs.get(shape)

    def pack(self, plans: Sequence[Plan | None]) -> list[np.ndarray]:
        """The buffers of a call for one plan per data shard: control, and admission where any plan has chunks."""
        packer = self.blueprint.packer
        mixed = any(plan is not None and plan.chunks for plan in plans)
        control = [packer.pack_control(plan) for plan in plans]
        admission = [packer.pack_admission(plan) for plan in plans] if mixed else []
        if self.blueprint.mesh is None:
            return [*control, *admission]
        return [np.stack(rows) for rows in (control, admission) if rows]

    def step(self, shape: Shape, buffers: Sequence[np.ndarray], call: int) -> Outcome:
        """Dispatch a step whose shape was prepared; `call` numbers it for `read`. If it raises, the state is lost."""
        program = self.programs.get(shape)
        if self._followers is not None:
            sizes = shape.num_slots, shape.prefill_tokens
            self._followers.broadcast(Message(Kind.CALL, *sizes, call=call, buffers=tuple(buffers)))
        placed = [
            to_devices(buffer, struct.sharding) for buffer, struct in zip(buffers, self.blueprint.buffers, strict=False)
        ]
        self.state, outcome = program(self.parameters, self.state, *placed)
        if outcome.hidden is not None:
            self._hidden.append((call, outcome.hidden))
        return outcome

    def read(self, name: str, call: int, arguments: Sequence[np.ndarray]) -> Any:
        """Call a program of scoring.READERS on the hidden rows that the numbered mixed step left."""
        hidden = next(rows for number, rows in self._hidden if number == call)
        shape = Shape(0, hidden.shape[0] // self.blueprint.parallel.data, name)
        mesh, program = self.blueprint.mesh, self.prepare(shape)
        if self._followers is not None:
            told = tuple(np.asarray(value, np.int32) for value in arguments)
            self._followers.broadcast(Message(Kind.CALL, 0, shape.prefill_tokens, name, call, told))
        if mesh is None:
            return program(self.parameters, hidden, *arguments)
        places = (mesh.by_data, mesh.everywhere) if name == "scores" else (mesh.everywhere,)
        placed = [to_devices(np.asarray(value), place) for value, place in zip(arguments, places, strict=True)]
        return program(self.parameters, hidden, *placed)

    def reset(self, reason: str = "") -> None:
        """Allocate the device state anew, as a failed call deleted it. Over several hosts, when the others' have ended.

        Raises RuntimeError, with the `reason`, or HostLostError where they do not.
        """
        if self._group is not None:
            self._group.restart(reason)
        self._hidden.clear()
        del self.state
        self.state = self.blueprint.empty_state()

    def obey(self, message: Message) -> Any:
        """Do what the first host does; returns arrays that are there when it is done."""
        if message.kind is Kind.RESET:
            self.reset()
            return None
        if message.kind is Kind.PREPARE:
            return self.programs.get(Shape(message.num_slots, message.prefill_tokens, message.reader))
        if message.reader:
            return self.read(message.reader, message.call, message.buffers)
        return self.step(Shape(message.num_slots, message.prefill_tokens), message.buffers, message.call).main

    def close(self) -> None:
        """Drop the device arrays."""
        self._hidden.clear()
        del self.state, self.parameters
