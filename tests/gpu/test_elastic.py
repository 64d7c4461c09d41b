"""Limits, sleep and neighbours on a GPU, as `tests/e2e` has them on the host."""

from tests.e2e.test_elastic import (  # noqa: F401
    pair,
    test_a_lower_limit_gives_back_what_is_cached_at_once,
    test_a_request_that_the_limit_has_no_room_for_is_refused_with_the_reason,
    test_a_thousand_steps_under_load,
    test_cached_prefixes_grow_old,
    test_sleep_lets_what_runs_end_and_what_arrives_wait,
    test_what_runs_comes_to_its_end_whatever_the_limit,
)
from tests.e2e.test_neighbours import (  # noqa: F401
    start,
    test_a_third_starts_beside_two_that_hold_everything,
    test_both_at_once_share_evenly,
    test_one_is_killed_in_the_middle_of_giving,
    test_one_that_is_killed_leaves_everything_to_the_other,
    test_peaks_that_take_turns,
    test_what_is_idle_is_given_before_what_is_cached_down_to_the_minimum,
    two,
)
