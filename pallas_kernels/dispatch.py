"""Which implementation of an operation runs: an automatic choice that explains itself, or a forced one that may refuse.

Hides importing backends on use and remembering what was logged. A backend is a module that supplies the operation's
own functions (`run`, as a rule) and `refuse(**case) -> str | None`, which is asked before anything is traced.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pallas_kernels.devices import Device

logger = logging.getLogger(__name__)

REFERENCE = "reference"  # every operation's oracle: slow, so it runs only where it is asked for

_logged: set[tuple[str, str]] = set()  # (operation, case) whose automatic choice was logged already


class BackendError(ValueError):
    """A backend that does not exist, or refuses the case it was forced on; the message says what would work."""


@dataclass(frozen=True, eq=False)
class Op:
    """An operation and its backends, `"name": "module"`, in the order in which an automatic choice prefers them.

    `platforms` names a backend's platforms where it does not take all; elsewhere it refuses without being imported.
    `invariant` names the platforms on which a backend can be asked for row invariance: a row's bits then depend on
    neither the number of rows nor the other rows. Nothing is promised where no test has seen it.
    """

    name: str
    backends: Mapping[str, str]
    platforms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    invariant: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def load(self, backend: str) -> Any:
        """The module of a backend, imported on first use. Raises BackendError for an unknown name."""
        if backend not in self.backends:
            raise BackendError(f"{self.name} backend {backend!r} is not one of auto, {', '.join(self.backends)}")
        return importlib.import_module(self.backends[backend])

    def refuse(self, backend: str, /, *, device: Device, invariant: bool = False, **case: Any) -> str | None:
        """Why a backend does not take the case on this device; None where it does. BackendError for an unknown name."""
        platforms = self.platforms.get(backend, (device.platform,))
        if device.platform not in platforms:
            return f"it is for {' and '.join(platforms)}, the device is {device}"
        if invariant and device.platform not in self.invariant.get(backend, ()):
            return f"its rows' bits may depend on the batch on {device}: no test has shown otherwise"
        return self.load(backend).refuse(device=device, **case)

    def refusals(self, *, device: Device, **case: Any) -> dict[str, str | None]:
        """For each backend: None where it takes the case, else its reason."""
        return {name: self.refuse(name, device=device, **case) for name in self.backends}

    def choose(self, backend: str, /, *, device: Device, **case: Any) -> tuple[str, Any]:
        """`(name, module)` of the backend for `case`, the keyword arguments of every backend's `refuse`.

        `backend` is "auto" (the first but the reference that does not refuse) or a name. `invariant=True` in the case
        asks for row invariance too. Raises BackendError when the named backend, or every backend but the reference,
        refuses.
        """
        case = {**case, "device": device}
        if backend == "auto":
            name, reasons = self.first_willing(**case)
            if name is None:
                raise BackendError(f"no {self.name} backend takes {_describe(case)}: {_join(reasons)}")
            self._log_once(name, reasons, case)
            return name, self.load(name)
        reason = self.refuse(backend, **case)
        if reason is None:
            return backend, self.load(backend)
        willing = [name for name, refusal in self.refusals(**case).items() if refusal is None]
        advice = f"what would work: auto, {', '.join(willing)}" if willing else "no other backend takes it either"
        raise BackendError(f"{self.name} backend {backend!r} refuses {_describe(case)}: {reason} ({advice})")

    def first_willing(self, **case: Any) -> tuple[str | None, dict[str, str]]:
        """The backend an automatic choice takes (None: only the reference would), and why those before it refuse."""
        reasons: dict[str, str] = {}
        for name in self.backends:
            if name == REFERENCE:
                continue
            reason = self.refuse(name, **case)
            if reason is None:
                return name, reasons
            reasons[name] = reason
        return None, reasons

    def _log_once(self, chosen: str, reasons: dict[str, str], case: dict[str, Any]) -> None:
        described = _describe(case)
        if (self.name, described) not in _logged:
            _logged.add((self.name, described))
            refused = f"; refused by {_join(reasons)}" if reasons else ""
            logger.info("%s (%s): %s%s", self.name, described, chosen, refused)


def _describe(case: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in case.items())


def _join(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
