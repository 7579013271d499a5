"""Scheduler against a device simulated on dictionaries (scheduler_sim): whatever happens, the same tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_sim import Driver, least_pages, make_request, run_call

from jaxinfer import prefill
from jaxinfer.config import BATCHING, EngineConfig
from jaxinfer.request import FinishReason, Priority, QueueFullError, Request, RequestError, SamplingParams
from jaxinfer.rope import LengthRule

MAX_MODEL_LEN = 40


def config_of(**options) -> EngineConfig:
    defaults = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_prefill_seqs": 2,
        "min_prefill_bucket": 1,
        "page_size": 4,
        "loop_steps": 8,
        "max_queue": 1000,
    }
    return EngineConfig(**{**defaults, **options})


def driver_of(
    windows: tuple[int | None, ...] = (None,), extra_pages: int = 100, rule: LengthRule | None = None, **options
) -> Driver:
    config = config_of(**options)
    num_pages = [least_pages(config, window, MAX_MODEL_LEN) + extra_pages for window in windows]
    return Driver(config, windows, num_pages, MAX_MODEL_LEN, rule)


def request_of(name: str, prompt: list[int] | int, max_tokens: int | None = 8, **options) -> Request:
    priority = options.pop("priority", Priority.ONLINE)
    tokens = tuple([1] * prompt if isinstance(prompt, int) else prompt)
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens, **options), priority=priority)


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("step_cost", [0, 32])  # 0: chunks are cut at every bucket's edge
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    windows=st.sampled_from([(None,), (6,), (None, 5), (3, 9)]),
    extra_pages=st.sampled_from([0, 0, 1, 3, 8, 60]),
    max_num_seqs=st.sampled_from([1, 2, 4, 8]),
    budget=st.sampled_from([1, 3, 8, 16, 64]),
    prefix_caching=st.booleans(),
    chunked_prefill=st.booleans(),
    rule=st.sampled_from([None, None, LengthRule(12, whole=True), LengthRule(12, whole=False)]),
)
def test_random_schedules_give_every_request_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
    batching: str,
    step_cost: int,
    seed: int,
    windows: tuple[int | None, ...],
    extra_pages: int,
    max_num_seqs: int,
    budget: int,
    prefix_caching: bool,
    chunked_prefill: bool,
    rule: LengthRule | None,
) -> None:
    monkeypatch.setattr(prefill, "STEP_TOKENS", step_cost)
    monkeypatch.setattr(prefill, "LONE_STEP_TOKENS", step_cost)
    rng = random.Random(seed)
    driver = driver_of(
        windows,
        extra_pages,
        rule,
        batching=batching,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_seqs=rng.choice([1, 2, 4]),
        loop_steps=rng.choice([1, 4, 16]),
        prefix_caching=prefix_caching,
        chunked_prefill=chunked_prefill or budget < MAX_MODEL_LEN,
    )
    to_add = rng.randint(1, 14)
    hard = rng.random() < 0.5  # aborts and lost devices too
    while to_add or rng.random() < 0.7:
        if to_add and rng.random() < 0.4:
            to_add -= 1
            driver.add(make_request(rng, to_add, 24, kinds=("req-", "req-", "nan-")), seed=rng.randrange(1000))
        if hard and driver.sequences and rng.random() < 0.08:
            driver.finish(rng.choice(driver.sequences))
        if hard and rng.random() < 0.03:
            driver.reset()
        driver.step(rng.randint(1, 16))
        driver.scheduler.check()
    driver.drain(max_calls=3000)
    driver.check_answers()
    first_in = {seq_id: turn for turn, seq_id in reversed(list(enumerate(driver.order)))}
    for priority in Priority:
        leaders = [s.seq_id for s in driver.sequences if s.request.priority is priority and s.index == 0]
        turns = [first_in[seq_id] for seq_id in leaders if seq_id in first_in]
        assert turns == sorted(turns), "within a class the first to come is the first to go"


# ---- order ------------------------------------------------------------------------------------------------------


def test_first_come_first_served_into_the_lowest_free_slot() -> None:
    driver = driver_of(max_prefill_seqs=4, max_num_batched_tokens=64)
    for index in range(6):
        driver.add(request_of(str(index), 3, max_tokens=2 + index))
    driver.step()
    assert [(a.slot, a.sequence.seq_id) for a in driver.plans[0].admissions] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    driver.drain(100)
    later = [(a.slot, a.sequence.seq_id) for plan in driver.plans[1:] for a in plan.admissions]
    assert later == [(0, 4), (1, 5)]
    driver.check_answers()


def test_online_goes_before_batch_but_only_eight_times() -> None:
    driver = driver_of(max_num_seqs=1)
    for index in range(3):
        driver.add(request_of(f"batch{index}", 3, max_tokens=1, priority=Priority.BATCH))
    for index in range(20):
        driver.add(request_of(f"online{index}", 3, max_tokens=1))
    driver.drain(200)
    assert driver.order == [*range(3, 11), 0, *range(11, 19), 1, *range(19, 23), 2]
    driver.check_answers()


def test_a_batch_request_ends_under_a_flood_of_online_ones_and_short_pages() -> None:
    """Preempted three times as the lowest class, it counts as online, and then it is the oldest.

    Its prompt takes five steps, so without that rule it would be preempted again and again before its first token.
    """
    driver = driver_of(extra_pages=2, max_num_seqs=3, max_num_batched_tokens=4, prefix_caching=False)
    (batch,) = driver.add(request_of("batch", 20, max_tokens=20, priority=Priority.BATCH))
    for turn in range(400):
        if driver.scheduler.num_waiting < 4:
            driver.add(request_of(f"online{turn}", 4, max_tokens=20), seed=turn)
        driver.step()
        if batch.seq_id in driver.ended:
            break
    assert driver.ended[batch.seq_id] is FinishReason.LENGTH
    assert batch.num_preemptions == 3
    driver.drain(2000)
    driver.check_answers()


# ---- admission modes --------------------------------------------------------------------------------------------


def test_static_batches_run_to_completion() -> None:
    driver = driver_of(batching="static", max_num_batched_tokens=64)
    for index in range(6):
        driver.add(request_of(str(index), 3, max_tokens=2 + 3 * index), seed=index)
    driver.step()
    driver.step()
    driver.add(request_of("late", 3, max_tokens=1))
    while len(driver.ended) < 4:
        assert set(driver.order) <= {0, 1, 2, 3}
        driver.step()
    driver.drain(100)
    assert driver.order == list(range(7))
    driver.check_answers()


def test_a_preempted_member_stays_in_its_static_batch() -> None:
    config = config_of(batching="static", max_num_seqs=3, prefix_caching=False)
    driver = Driver(config, (None,), [1 + 13], MAX_MODEL_LEN)
    _, long, preempted = (driver.add(request_of(str(n), [n] * 4, max_tokens=n), seed=n)[0] for n in (20, 36, 35))
    while driver.order.count(preempted.seq_id) < 2:
        driver.step()
    assert (long.num_preemptions, preempted.num_preemptions) == (0, 1)
    assert long.seq_id not in driver.ended, "it comes back while its batch runs"
    driver.drain(100)
    driver.check_answers()


def test_a_dynamic_batch_waits_for_company_or_time() -> None:
    driver = driver_of(batching="dynamic", max_batch_wait_s=0.05)
    driver.add(request_of("first", 3))
    arrived_s = driver.now_s
    assert driver.scheduler.plan(max_steps=8) is None
    assert driver.scheduler.next_deadline() == pytest.approx(arrived_s + 0.05)
    while not driver.plans:
        driver.step()
    assert driver.now_s == pytest.approx(arrived_s + 0.05)
    driver.drain(100)
    assert driver.scheduler.next_deadline() is None
    for index in range(4):
        driver.add(request_of(str(index), 3))
    num_plans = len(driver.plans)
    driver.step()
    assert len(driver.plans) == num_plans + 1, "a full batch does not wait"
    driver.drain(100)
    driver.check_answers()


# ---- prefill ----------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_chunked_and_decoding_goes_on_beside_it() -> None:
    driver = driver_of(max_num_batched_tokens=8)
    driver.add(request_of("short", 4, max_tokens=20))
    driver.step()
    (long,) = driver.add(request_of("long", [2] * 20, max_tokens=4))
    for _ in range(3):
        driver.step()
    mixed = driver.plans[1:]
    assert [[(c.start, c.length, c.final) for c in plan.chunks] for plan in mixed] == [
        [(0, 7, False)],
        [(7, 7, False)],
        [(14, 6, True)],
    ]
    assert [len(plan.running) for plan in mixed] == [1, 1, 2]
    driver.drain(100)
    driver.check_answers()
    assert long.num_cached == 0


@pytest.mark.parametrize(
    ("num_tokens", "step_tokens", "now"),
    [
        (264, 128, 256),  # 256 and 32 instead of 512
        (264, 32, 256),
        (383, 128, 383),  # 256 and 128 save as much as a step costs
        (383, 32, 256),
        (400, 32, 400),
        (512, 0, 512),
        (20, 0, 20),
        (140, 32, 128),
        (140, 128, 140),
    ],
)
def test_a_step_stops_at_a_bucket_where_that_saves_more_than_a_step(
    num_tokens: int, step_tokens: int, now: int
) -> None:
    assert prefill.unpadded(num_tokens, (32, 64, 128, 256, 512), step_tokens) == now


def test_the_last_chunk_of_a_step_is_cut_at_a_bucket() -> None:
    config = config_of(max_num_batched_tokens=512, min_prefill_bucket=32, max_num_seqs=2)
    driver = Driver(config, (None,), [400], 600)
    driver.add(request_of("long", 264, max_tokens=4))
    driver.drain(100)
    chunks = [[(c.start, c.length, c.final) for c in plan.chunks] for plan in driver.plans if plan.chunks]
    assert chunks == [[(0, 256, False)], [(256, 8, True)]]
    driver.check_answers()


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole() -> None:
    driver = driver_of(max_num_batched_tokens=40, chunked_prefill=False, max_prefill_seqs=4)
    driver.add(request_of("a", 30, max_tokens=5))
    driver.add(request_of("b", [2] * 30, max_tokens=5))
    driver.drain(100)
    assert [[(c.start, c.length, c.final) for c in plan.chunks] for plan in driver.plans if plan.chunks] == [
        [(0, 30, True)],
        [(0, 30, True)],
    ]
    driver.check_answers()


def test_a_second_request_with_the_same_prefix_computes_only_the_rest() -> None:
    driver = driver_of()
    driver.add(request_of("a", [1, 2, 3, 4, 0, 1, 2, 3, 4, 0], max_tokens=3))
    driver.drain(100)
    (again,) = driver.add(request_of("b", [1, 2, 3, 4, 0, 1, 2, 3, 4, 1], max_tokens=3))
    driver.drain(100)
    assert again.num_cached >= 8
    assert sum(chunk.length for plan in driver.plans for chunk in plan.chunks if chunk.sequence is again) <= 2
    driver.check_answers()


# ---- n completions ----------------------------------------------------------------------------------------------


def test_later_completions_share_the_first_ones_prompt() -> None:
    driver = driver_of(max_num_batched_tokens=64, max_prefill_seqs=4)
    leader, *siblings = driver.add(request_of("n", 9, n=4))
    driver.step()
    assert [a.sequence for a in driver.plans[0].admissions] == [leader]
    assert driver.scheduler.num_waiting == 3
    driver.drain(100)
    assert [s.num_cached for s in siblings] == [8, 8, 8]
    driver.check_answers()


@pytest.mark.parametrize(
    ("prompt", "options"), [(3, {}), (9, {"prefix_caching": False}), (9, {"batching": "static"})], ids=str
)
def test_completions_with_nothing_to_share_start_together(prompt: int, options: dict) -> None:
    driver = driver_of(max_num_batched_tokens=64, max_prefill_seqs=4, **options)
    sequences = driver.add(request_of("n", prompt, n=4))
    driver.step()
    assert [a.sequence for a in driver.plans[0].admissions] == sequences
    driver.drain(100)
    driver.check_answers()


def test_when_the_first_completion_is_aborted_the_others_go_on() -> None:
    driver = driver_of()
    leader, sibling = driver.add(request_of("n", 9, n=2))
    driver.finish(leader)
    driver.drain(100)
    assert driver.ended[sibling.seq_id] is not FinishReason.ABORT
    driver.check_answers()


def test_waiting_siblings_can_be_aborted() -> None:
    driver = driver_of()
    _, *siblings = driver.add(request_of("n", 9, n=3))
    for sibling in siblings:
        driver.finish(sibling)
    driver.drain(100)
    assert driver.order == [0]
    driver.check_answers()


# ---- the queue's limit ------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_all_completions_or_none() -> None:
    driver = driver_of(max_queue=5, max_num_seqs=1)
    driver.add(request_of("a", 9, n=4))
    with pytest.raises(QueueFullError, match="max_queue=5") as error:
        driver.add(request_of("b", 9, n=2))
    assert error.value.retry_after_s > 0
    assert driver.scheduler.num_waiting == 4
    driver.add(request_of("c", 9))
    with pytest.raises(QueueFullError):
        driver.add(request_of("d", 9))
    driver.step()  # one runs now
    driver.add(request_of("d", 9))
    driver.drain(200)
    driver.check_answers()


def test_more_completions_than_the_queue_holds_are_the_callers_mistake() -> None:
    driver = driver_of(max_queue=2)
    with pytest.raises(RequestError, match=r"3 completions.*max_queue is 2"):
        driver.add(request_of("a", 9, n=3))


# ---- loop length ------------------------------------------------------------------------------------------------


def test_steps_respect_the_engines_bound_the_config_and_what_is_left() -> None:
    driver = driver_of(loop_steps=8)
    driver.add(request_of("a", 3, max_tokens=20))
    driver.step()
    for max_steps in (3, 100, 100, 100):
        driver.step(max_steps)
    assert [plan.num_steps for plan in driver.plans] == [1, 3, 8, 8]
    driver.drain(10)
    driver.check_answers()


def test_no_call_is_planned_when_every_sequence_ends_in_the_one_in_flight() -> None:
    driver = driver_of()
    driver.add(request_of("a", 3, max_tokens=4))
    driver.step()
    driver.step(3)
    assert driver.flight is not None and driver.scheduler.plan(max_steps=8) is None
    driver.drain(2)
    assert len(driver.plans) == 2
    driver.check_answers()


def test_the_loop_exits_early_only_when_somebody_waits() -> None:
    driver = driver_of(max_num_seqs=2, max_num_batched_tokens=64)
    for index, max_tokens in enumerate((4, 12, 5)):
        driver.add(request_of(str(index), 3, max_tokens=max_tokens), seed=index)
    driver.drain(100)
    for plan in driver.plans:
        waits = 2 not in {a.sequence.seq_id for p in driver.plans[: driver.plans.index(plan) + 1] for a in p.admissions}
        assert plan.exit_on_free == (waits and not plan.chunks)
    assert any(plan.exit_on_free for plan in driver.plans)
    driver.check_answers()


# ---- ending from the host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(6))
def test_abort_at_any_moment_frees_the_slot_for_the_next_plan(turns: int) -> None:
    """turns 0: waiting; 1 and 2: prefilling; then decoding, always with a call in flight."""
    driver = driver_of(max_num_seqs=1, max_num_batched_tokens=8)
    (victim,) = driver.add(request_of("victim", [2] * 20, max_tokens=20))
    driver.add(request_of("next", 5, max_tokens=3))
    for _ in range(turns):
        driver.step(2)
    driver.finish(victim)
    driver.finish(victim)
    assert victim.slot is None
    driver.scheduler.check()
    driver.step()
    assert driver.plans[-1].stops == (() if turns == 0 else (0,))
    assert [a.slot for a in driver.plans[-1].admissions] == [0]
    driver.drain(100)
    driver.check_answers()


def test_nan_logits_end_one_request_and_its_prefix_is_not_reused() -> None:
    driver = driver_of(max_num_batched_tokens=64)
    for seed in range(30):
        driver.add(request_of("nan-", [1, 2, 3, 4, 0, 1, 2, 3, 4], max_tokens=10), seed=seed)
        driver.drain(100)
        if FinishReason.ERROR in driver.ended.values():
            break
    assert FinishReason.ERROR in driver.ended.values()
    (after,) = driver.add(request_of("after", [1, 2, 3, 4, 0, 1, 2, 3, 4], max_tokens=3))
    driver.drain(100)
    assert after.num_cached == 0
    driver.check_answers()


# ---- pages run out ----------------------------------------------------------------------------------------------


def test_preemption_takes_the_latest_and_never_the_oldest() -> None:
    driver = driver_of(extra_pages=0, max_num_seqs=4, prefix_caching=False, max_num_batched_tokens=64)
    sequences = [driver.add(request_of(str(i), [i] * 4, max_tokens=None), seed=i)[0] for i in range(3)]
    driver.drain(300)
    assert driver.scheduler.num_preemptions > 0
    preemptions = [sequence.num_preemptions for sequence in sequences]
    assert preemptions[0] == 0 and preemptions == sorted(preemptions)
    driver.check_answers()


def test_fewer_steps_come_before_preemption() -> None:
    """Two sequences want 14 pages in the end, and there are 11."""
    driver = Driver(config_of(max_num_batched_tokens=64, prefix_caching=False), (None,), [1 + 11], MAX_MODEL_LEN)
    sequences = [driver.add(request_of(name, 5, max_tokens=20), seed=3)[0] for name in "ab"]
    while not driver.scheduler.num_preemptions:
        driver.step()
    loops = [plan.num_steps for plan in driver.plans if not plan.chunks and len(plan.running) == 2]
    assert loops[0] == 8 > loops[-1] and loops == sorted(loops, reverse=True)
    driver.drain(100)
    assert [sequence.num_preemptions for sequence in sequences] == [0, 1]
    driver.check_answers()


# ---- the device is lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", BATCHING)
def test_after_a_lost_device_everything_is_recomputed(batching: str) -> None:
    driver = driver_of(batching=batching, max_num_batched_tokens=8, max_batch_wait_s=0.0)
    for index in range(6):
        driver.add(request_of(str(index), 6 + index, max_tokens=10), seed=index)
    for turn in range(40):
        driver.step(3)
        if turn % 7 == 6:
            driver.reset()
            driver.scheduler.check()
            assert driver.scheduler.num_running == 0
            lost = [sequence for sequence in driver.sequences if sequence.finish_reason is None]
            assert driver.scheduler.owed_rows == sum(len(sequence.tokens) for sequence in lost)
    driver.drain(200)
    driver.check_answers()


# ---- misuse -----------------------------------------------------------------------------------------------------


def test_results_must_come_in_order_and_calls_do_not_pile_up() -> None:
    driver = driver_of()
    driver.add(request_of("a", 3, max_tokens=30))
    scheduler = driver.scheduler
    plans = [scheduler.plan(max_steps=2), scheduler.plan(max_steps=2)]
    assert all(plan is not None for plan in plans)
    with pytest.raises(AssertionError, match="in flight"):
        scheduler.plan(max_steps=2)
    with pytest.raises(AssertionError, match="order"):
        scheduler.apply(plans[1], run_call(driver.devices, (plans[0],))[0])


def test_a_replayed_batch_does_not_wait_for_company() -> None:
    driver = driver_of(batching="dynamic", max_batch_wait_s=100.0, max_num_seqs=4)
    driver.add(request_of("a", 4, max_tokens=5))
    driver.now_s += 101
    driver.step()
    driver.reset()
    deadline_s = driver.scheduler.next_deadline()
    assert deadline_s is not None and deadline_s <= driver.now_s
    driver.drain(100)
    driver.check_answers()
