"""ShardedScheduler against devices simulated in step (scheduler_sim), and where it sends requests."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_sim import Driver, expected_completion, least_pages, make_request

from jaxinfer import prefill
from jaxinfer.config import BATCHING, EngineConfig
from jaxinfer.plan import Sequence
from jaxinfer.request import QueueFullError, Request, RequestError, SamplingParams
from jaxinfer.rope import LengthRule
from jaxinfer.sharded_scheduler import NO_SLOT_ROWS, SEQUENCE_ROWS

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
    data: int = 2,
    context: int = 1,
    windows: tuple[int | None, ...] = (None,),
    extra_pages: int = 100,
    rule: LengthRule | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    **options,
) -> Driver:
    config = config_of(**options)
    num_pages = [least_pages(config, window, max_model_len, context) + extra_pages for window in windows]
    return Driver(config, windows, num_pages, max_model_len, rule, data=data, context=context)


def request_of(name: str, prompt: list[int] | int, max_tokens: int | None = 8, **options) -> Request:
    tokens = tuple([1] * prompt if isinstance(prompt, int) else prompt)
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens, **options))


def add(driver: Driver, *prompts: list[int] | int, **options) -> list[Sequence]:
    """One sequence per prompt."""
    sequences = []
    for prompt in prompts:
        seed = len(driver.sequences)
        sequences += driver.add(request_of(str(seed), prompt, **options), seed)
    return sequences


def shards_of(sequences: list[Sequence]) -> list[int]:
    return [sequence.data_shard for sequence in sequences]


@pytest.mark.parametrize("data", [1, 2, 3])
@pytest.mark.parametrize("context", [1, 2, 4])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    windows=st.sampled_from([(None,), (6,), (None, 5), (3, 9)]),
    extra_pages=st.sampled_from([0, 0, 1, 3, 8, 60]),
    slots_per_shard=st.sampled_from([1, 2, 4]),
    budget=st.sampled_from([1, 3, 8, 16, 64]),
    step_cost=st.sampled_from([0, 32]),  # 0: chunks are cut at every bucket's edge
    prefix_caching=st.sampled_from([True, True, False]),
    chunked_prefill=st.booleans(),
    batching=st.sampled_from(["continuous", "continuous", *BATCHING]),
    rule=st.sampled_from([None, None, LengthRule(12, whole=True), LengthRule(12, whole=False)]),
)
def test_random_schedules_give_every_request_its_tokens(
    data: int,
    context: int,
    seed: int,
    windows: tuple[int | None, ...],
    extra_pages: int,
    slots_per_shard: int,
    budget: int,
    step_cost: int,
    prefix_caching: bool,
    chunked_prefill: bool,
    batching: str,
    rule: LengthRule | None,
) -> None:
    rng = random.Random(seed)
    driver = driver_of(
        data,
        context,
        windows,
        extra_pages,
        rule,
        batching=batching,
        max_num_seqs=slots_per_shard * data,
        max_num_batched_tokens=budget,
        max_prefill_seqs=rng.choice([1, 2, 4]),
        loop_steps=rng.choice([1, 4, 16]),
        prefix_caching=prefix_caching,
        chunked_prefill=chunked_prefill or budget < MAX_MODEL_LEN,
    )
    to_add = rng.randint(1, 20)
    hard = rng.random() < 0.5  # aborts and lost devices too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "STEP_TOKENS", step_cost)
        patch.setattr(prefill, "LONE_STEP_TOKENS", step_cost)
        while to_add or rng.random() < 0.7:
            if to_add and rng.random() < 0.5:
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


def test_a_prompt_longer_than_one_context_shards_pool_runs() -> None:
    driver = driver_of(data=1, context=4, extra_pages=0)
    assert driver.caches[0].shard_usage()[0][0].total * 4 < 36
    (long,) = add(driver, 36, max_tokens=4)
    driver.drain(100)
    (again,) = add(driver, 36, max_tokens=4)
    driver.drain(100)
    assert (long.num_cached, again.num_cached) == (0, 35)
    add(driver, [2] * 30, [3] * 30)
    driver.drain(100)
    driver.check_answers()


# ---- where requests go ------------------------------------------------------------------------------------------


def test_requests_go_to_the_least_loaded_shard_into_its_own_slots() -> None:
    driver = driver_of(data=3, max_num_seqs=6)
    sequences = add(driver, *([n] * 3 for n in range(5)))
    assert shards_of(sequences) == [0, 1, 2, 0, 1]
    assert [sequence.seq_id for sequence in sequences] == list(range(5))
    driver.step()
    assert [[a.slot for a in plan.admissions] for plan in driver.calls[0]] == [[0, 1], [0, 1], [0]]
    driver.drain(100)
    driver.check_answers()


def test_prompt_tokens_still_to_compute_count_as_load() -> None:
    driver = driver_of(max_model_len=600, max_num_seqs=8)
    assert shards_of(add(driver, [1] * 400, [2], [3], [4])) == [0, 1, 1, 1]
    driver.drain(100)
    driver.check_answers()


def test_a_cached_prefix_draws_a_request_until_others_weigh_more() -> None:
    """Each sequence on a shard costs as much as SEQUENCE_ROWS prompt rows."""
    num_rows = 2 * SEQUENCE_ROWS + 20
    driver = driver_of(max_model_len=600, max_num_seqs=16, max_num_batched_tokens=512)
    tokens = [n % 4 for n in range(num_rows)]
    assert shards_of(add(driver, [4] * 3, tokens, max_tokens=2)) == [0, 1]
    driver.drain(100)
    sequences = add(driver, *([*tokens, n] for n in range(4)))
    assert shards_of(sequences) == [1, 1, 1, 0], "the fourth had three before it there"
    driver.drain(100)
    assert [sequence.num_cached >= num_rows for sequence in sequences] == [True, True, True, False]
    driver.check_answers()


def test_only_a_long_cached_prefix_is_worth_a_wait_for_a_slot() -> None:
    driver = driver_of(max_model_len=2000, max_num_seqs=2, max_num_batched_tokens=512)
    short, long = [1, 2] * (NO_SLOT_ROWS // 4), [3, 4] * (NO_SLOT_ROWS * 3 // 4)
    for prompt in (short, long):
        assert shards_of(add(driver, prompt, max_tokens=1)) == [0]
        driver.drain(100)
    add(driver, 3, max_tokens=100)
    driver.step()
    (waits,) = add(driver, [*long, 1])
    assert waits.data_shard == 0
    driver.step()
    assert (waits.data_shard, waits.slot) == (0, None), "nor does it move to the free slot"
    assert shards_of(add(driver, [*short, 1])) == [1]
    driver.drain(1000)
    assert waits.num_cached == len(long)
    driver.check_answers()


def test_a_prompt_to_be_scored_goes_where_the_load_is_least() -> None:
    """It is computed in full, whatever is cached."""
    driver = driver_of(max_model_len=600, max_num_batched_tokens=512)
    tokens = [n % 4 for n in range(300)]
    add(driver, tokens, max_tokens=1)
    driver.drain(100)
    add(driver, tokens)
    assert shards_of(add(driver, tokens, prompt_logprobs=0)) == [1]
    driver.drain(100)
    driver.check_answers()


def test_a_shard_that_lacks_pages_is_passed_by() -> None:
    """Shard 0 runs one sequence and shard 1 three, but the one holds 9 of 11 pages."""
    driver = driver_of(max_num_seqs=8, extra_pages=0, max_num_batched_tokens=64, max_prefill_seqs=4)
    sequences = add(driver, 36, [2], [3], [4], [0], max_tokens=4)
    assert shards_of(sequences) == [0, 1, 1, 0, 1]
    driver.finish(sequences[3])
    driver.step()
    assert shards_of(add(driver, [2] * 20, [3] * 2)) == [1, 0]
    driver.drain(300)
    driver.check_answers()


def test_all_completions_of_a_request_share_a_shard_and_the_prompts_pages() -> None:
    driver = driver_of(max_num_seqs=8)
    sequences = driver.add(request_of("n", 9, n=4))
    others = driver.add(request_of("m", [2] * 9, n=4))
    assert (set(shards_of(sequences)), set(shards_of(others))) == ({0}, {1})
    driver.drain(100)
    assert [s.num_cached for s in [*sequences[1:], *others[1:]]] == [8] * 6
    driver.check_answers()


# ---- requests that wait move ------------------------------------------------------------------------------------


def test_no_shard_idles_while_another_ones_queue_stands_still() -> None:
    driver = driver_of(max_num_seqs=2)
    sequences = add(driver, *([n] * 3 for n in range(6)), max_tokens=30)
    assert shards_of(sequences) == [0, 1, 0, 1, 0, 1]
    driver.step()
    for sequence in sequences[1::2]:
        driver.finish(sequence)
    driver.step()
    assert shards_of(sequences) == [0, 1, 1, 1, 0, 1], "only the next one moves: there is one slot"
    driver.step()
    assert driver.scheduler.num_running == 2
    driver.drain(100)
    driver.check_answers()


def test_a_request_moves_with_all_its_completions() -> None:
    driver = driver_of(max_num_seqs=4)
    add(driver, [0] * 3, [1] * 3, [2] * 3, [3] * 3, max_tokens=30)
    driver.step()
    sequences = driver.add(request_of("n", 9, n=3))
    assert shards_of(sequences) == [0] * 3
    driver.finish(sequences[1])
    driver.finish(driver.sequences[1])
    driver.step()
    assert shards_of(sequences) == [1, 0, 1]
    driver.drain(100)
    assert sequences[2].num_cached == 8
    driver.check_answers()


@pytest.mark.parametrize("batching", ["static", "dynamic"])
def test_batches_are_formed_per_shard_and_nobody_leaves_its_own(batching: str) -> None:
    driver = driver_of(max_num_seqs=2, batching=batching, max_batch_wait_s=0.0)
    sequences = add(driver, *([n] * 3 for n in range(6)), max_tokens=12)
    driver.step()
    for sequence in sequences[1::2]:
        driver.finish(sequence)
    driver.drain(100)
    assert shards_of(sequences) == [0, 1, 0, 1, 0, 1]
    driver.check_answers()


# ---- one call for all -------------------------------------------------------------------------------------------


def steps_of(driver: Driver) -> list[tuple[int, ...]]:
    """Per call, each shard's steps; 0: no plan."""
    return [tuple(0 if plan is None else plan.num_steps for plan in plans) for plans in driver.calls]


@pytest.mark.parametrize("late", [0, 1])
def test_while_one_shard_prefills_every_shard_makes_one_step(late: int) -> None:
    driver = driver_of(max_num_batched_tokens=8)
    early = add(driver, 3, [2] * 3, max_tokens=30)
    for _ in range(3):
        driver.step(4)
    driver.finish(early[late])
    add(driver, [3] * 20, max_tokens=3)
    for _ in range(4):
        driver.step(4)
    assert shards_of(driver.sequences) == [0, 1, late]
    assert steps_of(driver)[:3] == [(1, 1), (4, 4), (4, 4)]
    assert steps_of(driver)[3:6] == [(1, 1)] * 3, "chunks of 8, 8 and 4 tokens"
    chunked = [[bool(plan.chunks) for plan in plans] for plans in driver.calls[3:6]]
    assert chunked == [[late == 0, late == 1]] * 3
    driver.drain(100)
    driver.check_answers()


def test_in_a_loop_each_shard_has_its_own_number_of_steps() -> None:
    driver = driver_of()
    driver.add(request_of("a", 3, max_tokens=4))
    driver.add(request_of("b", [2] * 3, max_tokens=20))
    driver.step()
    driver.step()
    driver.step()
    assert steps_of(driver) == [(1, 1), (3, 8), (0, 8)]
    driver.drain(100)
    driver.check_answers()


def test_an_idle_shard_has_no_plan_and_without_any_there_is_no_call() -> None:
    driver = driver_of(data=3, max_num_seqs=3)
    assert driver.scheduler.plan(max_steps=8) is None
    (only,) = add(driver, 3)
    driver.drain(100)
    assert all(plans[1:] == (None, None) for plans in driver.calls) and only.data_shard == 0
    with pytest.raises(AssertionError, match="result without a plan"):
        driver.scheduler.apply((None, None, None), [None, driver.devices[0].end(), None])
    driver.check_answers()


def test_when_a_slot_frees_for_somebody_the_loop_ends_for_all() -> None:
    """The other shard's plan had more steps than were made; what it knows of its sequences stays right."""
    driver = driver_of(max_num_seqs=2, loop_steps=16, prefix_caching=False)
    stops = next(
        seed for seed in range(1000) if len(completion(request_of("a", 3, 20, stop_token_ids=(3,)), seed)) == 4
    )
    driver.add(request_of("a", 3, max_tokens=20, stop_token_ids=(3,)), stops)
    (long,) = driver.add(request_of("b", [2] * 3, max_tokens=36))
    (waits,) = driver.add(request_of("c", 4, max_tokens=5))
    assert shards_of(driver.sequences) == [0, 1, 0]
    driver.step()
    driver.step(10)
    loop = driver.calls[-1]
    assert [(plan.num_steps, plan.exit_on_free, plan.least_steps) for plan in loop] == [(10, True, 0), (10, False, 0)]
    driver.step(10)
    assert len(long.tokens) == 3 + 1 + 3, "it was to make 10 steps, and made 3"
    driver.drain(100)
    assert waits.seq_id in driver.ended
    driver.check_answers()


def completion(request: Request, seed: int) -> list[int]:
    return expected_completion(request, seed, MAX_MODEL_LEN, None)[0]


def test_while_a_shard_is_held_up_the_others_do_not_start_a_long_loop() -> None:
    """Shard 0's only slot will be free once the call in flight was applied, and somebody waits for it."""
    driver = driver_of(max_num_seqs=2)
    add(driver, 3, max_tokens=4)
    add(driver, [2] * 3, max_tokens=36)
    (waits,) = add(driver, [3] * 3, max_tokens=8)
    assert waits.data_shard == 0
    for _ in range(4):
        driver.step()
    assert steps_of(driver) == [(1, 1), (3, 8), (0, 1), (1, 1)]
    assert driver.calls[3][0].admissions
    driver.drain(100)
    driver.check_answers()


@pytest.mark.parametrize(
    ("prompts", "chunks"),
    [
        ((264, 500), (264, 500)),  # a step of 512 runs anyway
        ((264, 200), (256, 200)),
        ((264, 270), (256, 256)),
    ],
)
def test_shards_stop_at_a_buckets_edge_together(prompts: tuple[int, int], chunks: tuple[int, int]) -> None:
    driver = driver_of(max_model_len=600, max_num_batched_tokens=512, min_prefill_bucket=32)
    add(driver, *([index] * length for index, length in enumerate(prompts)), max_tokens=2)
    driver.step()
    assert tuple(sum(chunk.length for chunk in plan.chunks) for plan in driver.calls[0]) == chunks
    driver.drain(100)
    driver.check_answers()


def test_calls_do_not_pile_up_on_any_shard() -> None:
    driver = driver_of()
    add(driver, 3, [2] * 3, max_tokens=30)
    assert all(driver.scheduler.plan(max_steps=2) is not None for _ in range(2))
    with pytest.raises(AssertionError, match="in flight"):
        driver.scheduler.plan(max_steps=2)


# ---- the rest of the interface ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_num_seqs", "choices"), [(10, "9 or 12"), (2, "such as 3")])
def test_slots_must_divide_over_the_shards(max_num_seqs: int, choices: str) -> None:
    with pytest.raises(ValueError, match=rf"max_num_seqs={max_num_seqs} must be a multiple of 3.*{choices}"):
        driver_of(data=3, max_num_seqs=max_num_seqs)


def test_the_queue_is_full_for_all_shards_together() -> None:
    driver = driver_of(max_queue=5, max_num_seqs=2)
    driver.add(request_of("a", 9, n=3))
    driver.add(request_of("b", [2] * 9, n=2))
    assert set(shards_of(driver.sequences)) == {0, 1}
    with pytest.raises(QueueFullError, match="max_queue=5") as error:
        driver.add(request_of("c", 3))
    assert error.value.retry_after_s > 0
    with pytest.raises(RequestError, match=r"6 completions.*max_queue is 5"):
        driver.add(request_of("d", 9, n=6))
    driver.step()  # two run now
    driver.add(request_of("c", 3, n=2))
    with pytest.raises(QueueFullError):
        driver.add(request_of("d", 3))
    driver.drain(200)
    driver.check_answers()


def test_a_deadline_counts_only_while_no_shard_runs() -> None:
    driver = driver_of(batching="dynamic", max_batch_wait_s=0.05)
    assert driver.scheduler.next_deadline() is None
    add(driver, 3, max_tokens=3)
    arrived_s = driver.now_s
    assert driver.scheduler.next_deadline() == pytest.approx(arrived_s + 0.05)
    driver.now_s += 0.03
    (second,) = add(driver, [2] * 3, max_tokens=3)
    assert second.data_shard == 1 and driver.scheduler.next_deadline() == pytest.approx(arrived_s + 0.05)
    while not driver.calls:
        driver.step()
    assert driver.calls[0][1] is None and driver.scheduler.next_deadline() is None, "shard 0 runs"
    driver.drain(100)
    driver.check_answers()


def test_counts_are_sums_and_a_lost_device_is_lost_on_every_shard() -> None:
    driver = driver_of(max_num_seqs=2)
    add(driver, *([n] * 5 for n in range(3)), max_tokens=9)
    driver.step()
    scheduler = driver.scheduler
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.has_work) == (2, 1, True)
    assert scheduler.usage()[0].used == 4 and scheduler.usage()[0].total == 2 * driver.caches[0].usage()[0].total
    driver.reset()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.usage()[0].used) == (0, 3, 0)
    driver.drain(100)
    assert not scheduler.has_work
    driver.check_answers()
