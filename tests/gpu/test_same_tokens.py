"""The scenarios of `tests/e2e`, on a GPU: FlashAttention-3 on both sides, CUDA graphs, the overlap scheduler."""

from tests.e2e.test_same_tokens import (  # noqa: F401
    test_a_batch,
    test_a_pool_so_small_that_leaves_are_evicted_and_requests_retracted,
    test_aborts_in_the_middle,
    test_chunked_prefill,
    test_conversations_go_on_in_place,
    test_equal_prompts_wait_for_each_other_once,
    test_flush_forgets_everything,
    test_parallel_sampling,
    test_separate_namespaces_share_nothing,
    test_several_go_on_from_one_unfinished_page,
    test_single_requests_of_every_length,
    test_the_same_prompt_twice_in_one_batch,
    test_two_branches_in_the_middle_of_a_page,
    test_what_another_request_computes_is_not_computed_again,
)
