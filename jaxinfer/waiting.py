"""The queue of sequences that wait for a slot: order, classes, aging and the three admission modes.

Hides the heaps, lazy removal, and when a static or dynamic batch opens. `head()` is always the next to admit.
"""

from __future__ import annotations

import heapq

from jaxinfer.plan import Sequence

ONLINE_PER_BATCH = 8  # online admissions that may pass a waiting batch sequence before one of them goes first
PREEMPTIONS_TO_PROMOTE = 3  # a batch sequence preempted so often counts as online from then on


class _Heap:
    """Sequences by arrival; removed ones are skipped when they come up."""

    __slots__ = ("_entries", "_live")

    def __init__(self) -> None:
        self._entries: list[tuple[int, Sequence]] = []
        self._live: set[int] = set()

    def __len__(self) -> int:
        return len(self._live)

    def push(self, sequence: Sequence) -> None:
        self._live.add(sequence.seq_id)
        heapq.heappush(self._entries, (sequence.seq_id, sequence))

    def head(self) -> Sequence | None:
        while self._entries and self._entries[0][0] not in self._live:
            heapq.heappop(self._entries)
        return self._entries[0][1] if self._entries else None

    def sequences(self) -> list[Sequence]:
        """All of them, in no order."""
        return [sequence for seq_id, sequence in self._entries if seq_id in self._live]

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out; False when it is not here. Only one that was the head may be pushed again."""
        if sequence.seq_id not in self._live:
            return False
        self._live.remove(sequence.seq_id)
        if self._entries[0][1] is sequence:
            heapq.heappop(self._entries)
        elif len(self._entries) > 2 * len(self._live) + 64:
            self._entries = [entry for entry in self._entries if entry[0] in self._live]
            heapq.heapify(self._entries)
        return True


class WaitingQueue:
    """First in, first out within a class; online (rank 0) before batch (rank 1), but see ONLINE_PER_BATCH.

    continuous: whoever heads the queue may go. static: when nothing runs, up to `batch_size` are taken and run to
    completion. dynamic: the same, but a batch opens only when `batch_size` wait or the oldest waited `max_wait_s`.
    A preempted sequence is older than all that never ran, so it heads its class again.
    """

    def __init__(self, batching: str, batch_size: int, max_wait_s: float):
        self._continuous = batching == "continuous"
        self._max_wait_s = max_wait_s if batching == "dynamic" else 0.0
        self._batch_size = batch_size
        self._classes = (_Heap(), _Heap())  # by rank
        self._batch = _Heap()  # static, dynamic: taken, and still to be admitted
        self._parked: dict[int, Sequence] = {}  # siblings that wait for their leader's prefill
        self.owed_rows = 0  # of all who wait: rows to compute
        self._num_passed = 0  # online admissions since a batch sequence could have gone

    def __len__(self) -> int:
        return len(self._classes[0]) + len(self._classes[1]) + len(self._batch) + len(self._parked)

    def push(self, sequence: Sequence) -> None:
        """A new sequence, or one that was preempted (in static and dynamic mode it still belongs to its batch)."""
        self.owed_rows += len(sequence.tokens) - sequence.prefill_planned
        if sequence.was_admitted and not self._continuous:
            self._batch.push(sequence)
        else:
            self._classes[sequence.rank].push(sequence)

    def park(self, sequence: Sequence) -> None:
        """Waiting, but not to be admitted until `unpark`."""
        self.owed_rows += len(sequence.tokens) - sequence.prefill_planned
        self._parked[sequence.seq_id] = sequence

    def unpark(self, sequence: Sequence) -> None:
        """Let a parked sequence queue in its place by arrival; no-op when it was removed."""
        if self._parked.pop(sequence.seq_id, None) is not None:
            self.owed_rows -= len(sequence.tokens) - sequence.prefill_planned
            self.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A waiting sequence ended."""
        self.owed_rows -= len(sequence.tokens) - sequence.prefill_planned
        if self._parked.pop(sequence.seq_id, None) is None and not self._batch.remove(sequence):
            removed = self._classes[sequence.rank].remove(sequence)
            assert removed, f"sequence {sequence.seq_id} does not wait"

    def head(self) -> Sequence | None:
        """The next sequence to admit, or None."""
        return self._next_in_line() if self._continuous else self._batch.head()

    def pop(self) -> Sequence:
        """Take the head out: it is admitted."""
        sequence = self._pop_in_line() if self._continuous else self._batch.head()
        assert sequence is not None, "nobody waits"
        if not self._continuous:
            self._batch.remove(sequence)
        self.owed_rows -= len(sequence.tokens) - sequence.prefill_planned
        return sequence

    def open_batch(self, now_s: float) -> None:
        """Static and dynamic modes, when nothing runs: take the next batch if it is time."""
        if self._continuous or self._batch.head() is not None:
            return
        deadline_s = self.next_deadline()
        if deadline_s is None or now_s < deadline_s:
            return
        while len(self._batch) < self._batch_size and self._next_in_line() is not None:
            self._batch.push(self._pop_in_line())

    def next_deadline(self) -> float | None:
        """When a batch may open at the latest (the past: now), by the clock of `arrival_s`; None: nobody waits."""
        replayed = self._batch.head()
        if replayed is not None:
            return replayed.arrival_s
        heads = [head for head in (heap.head() for heap in self._classes) if head is not None]
        if self._continuous or not heads:
            return None
        oldest_s = min(head.arrival_s for head in heads)
        num_waiting = sum(len(heap) for heap in self._classes)
        return oldest_s if num_waiting >= self._batch_size else oldest_s + self._max_wait_s

    def _next_in_line(self) -> Sequence | None:
        online, batch = self._classes[0].head(), self._classes[1].head()
        if batch is not None and (online is None or self._num_passed >= ONLINE_PER_BATCH):
            return batch
        return online

    def _pop_in_line(self) -> Sequence:
        sequence = self._next_in_line()
        assert sequence is not None, "nobody waits"
        self._classes[sequence.rank].remove(sequence)
        passes = sequence.rank == 0 and len(self._classes[1]) > 0
        self._num_passed = self._num_passed + 1 if passes else 0
        return sequence

    def check(self) -> None:
        """AssertionError when `owed_rows` are not those of the sequences that wait."""
        waiting = [*self._parked.values(), *(s for heap in (*self._classes, self._batch) for s in heap.sequences())]
        owed_rows = sum(len(sequence.tokens) - sequence.prefill_planned for sequence in waiting)
        assert owed_rows == self.owed_rows, f"waiting sequences owe {owed_rows} rows, not {self.owed_rows}"
