"""The forty faults and bad inputs that a system for training must survive, each with its tests.

A test is named without its file: its name is a sentence, and `grep` finds it.
"""

import ast
import pathlib
from typing import NamedTuple

import pytest

TESTS = pathlib.Path(__file__).parents[1]


class Case(NamedTuple):
    words: str
    tests: tuple[str, ...] = ()
    reason: str = ""  # why no test, or less than the words say


INTERRUPTED = (
    "test_a_run_that_is_killed_and_stopped_loses_nothing_and_ends_bitwise_like_the_unbroken_one"
)
CASES = {
    1: Case("SIGTERM in a step: one save, exit 75, resumed bitwise", (INTERRUPTED,)),
    2: Case(
        "a second signal ends the program at once",
        (
            "test_a_second_signal_ends_at_once",
            "test_the_second_signal_ends_the_process_at_once",
        ),
    ),
    3: Case("SIGKILL at random times, in saves too", (INTERRUPTED,)),
    4: Case(
        "a worker of the data pipeline is killed",
        reason="batches are read by threads of the process itself, which has no worker to kill",
    ),
    5: Case(
        "disk full during a save: an error at the next step, older checkpoints kept",
        (
            INTERRUPTED,
            "test_a_save_that_fails_is_named_at_the_next_step",
            "test_a_save_without_room_is_refused_before_anything_is_written",
        ),
    ),
    6: Case(
        "a workdir that cannot be made or written is refused before compilation",
        (
            "test_a_directory_that_cannot_be_written_is_named_at_once",
            "test_a_workdir_that_cannot_be_made_is_refused_before_the_step_compiles",
        ),
    ),
    7: Case(
        "names of step folders that lie: of the future, of a wrong clock, taken twice",
        (
            "test_folders_that_are_no_checkpoints_are_neither_believed_nor_deleted",
            "test_what_was_saved_last_stays_beside_later_ones_that_do_not_verify",
        ),
    ),
    8: Case(
        "two runs in one workdir",
        (
            "test_a_workdir_in_use_and_one_of_another_model_are_refused",
            "test_a_folder_that_another_run_is_using_is_refused_before_its_first_checkpoint",
        ),
    ),
    9: Case(
        "a flipped bit in any file of a checkpoint",
        (
            "test_a_flipped_bit_in_a_checkpoint_is_found_and_named_or_changes_nothing",
            "test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken",
        ),
    ),
    10: Case(
        "any file of a checkpoint deleted, halved or emptied",
        ("test_a_file_of_a_checkpoint_that_is_deleted_halved_or_emptied_is_found_or_not_needed",),
    ),
    11: Case(
        "empty, temporary and foreign folders among the checkpoints",
        (
            "test_folders_that_are_no_checkpoints_are_neither_believed_nor_deleted",
            "test_only_the_folders_of_saves_that_were_killed_are_removed",
        ),
    ),
    12: Case(
        "the checkpoint before is taken, with a warning; nothing begins anew",
        (
            "test_a_broken_newest_checkpoint_is_passed_over",
            "test_where_none_verifies_nothing_is_begun_anew",
            "test_a_run_whose_checkpoints_are_gone_is_not_begun_anew",
        ),
    ),
    13: Case(
        "restored on another mesh and another number of devices and processes",
        (
            "test_a_state_is_restored_onto_another_mesh",
            "test_a_checkpoint_of_one_mesh_goes_on_with_the_same_losses_on_another",
            "test_a_run_stopped_killed_and_moved_to_one_process_ends_like_one_that_was_never_two",
        ),
    ),
    14: Case(
        "restored with another optimizer: refused with the fields that differ",
        (
            "test_a_workdir_in_use_and_one_of_another_model_are_refused",
            "test_another_model_is_refused_by_the_names_of_its_leaves",
        ),
    ),
    15: Case(
        "another dtype only where it is asked for",
        ("test_a_checkpoint_in_another_dtype_is_refused_with_both",),
    ),
    16: Case(
        "missing, surplus and misshapen leaves are listed",
        ("test_another_model_is_refused_by_the_names_of_its_leaves",),
    ),
    17: Case(
        "hostile folders: links, paths, huge sizes, pickles, forged headers",
        (
            "test_a_link_out_of_the_checkpoint_is_not_followed",
            "test_a_link_out_of_the_folder_is_refused",
            "test_a_hostile_file_is_refused_in_one_line_that_names_it",
            "test_a_hostile_index_is_refused_in_one_line_that_names_it",
            "test_a_header_longer_than_100_MB_is_refused_unread",
            "test_an_index_that_places_a_tensor_where_it_is_not_is_refused",
            "test_a_tensor_in_two_shards_is_refused",
            "test_a_pickle_is_never_opened",
        ),
    ),
    18: Case(
        "a config.json with unknown fields or RoPE variants",
        (
            "test_an_unknown_model_type_is_refused",
            "test_a_key_of_any_model_that_changes_the_computation_is_refused",
            "test_no_key_of_a_family_goes_unchecked",
            "test_settings_of_rope_that_contradict_each_other_are_refused",
        ),
    ),
    19: Case(
        "Hugging Face folders come back bitwise, experts one by one or stacked",
        (
            "test_a_saved_model_loads_as_the_same_and_has_the_same_tensors",
            "test_logits_are_the_references",
        ),
    ),
    20: Case(
        "a NaN in loss, one expert's gradient or one device's rows: skipped bitwise, ended with 3",
        (
            "test_a_step_with_a_nan_in_loss_shard_or_expert_changes_no_bit_and_the_run_goes_on",
            "test_a_nan_in_adams_moments_ends_the_run_with_3",
            "test_a_nan_in_an_unused_weight_of_the_parent_ends_the_run",
            "test_a_step_that_is_not_finite_leaves_parameters_and_moments_bitwise",
            "test_every_skipped_step_is_said_counted_and_in_the_checkpoint",
            "test_losses_that_stay_not_finite_end_the_run_with_3",
        ),
    ),
    21: Case(
        "a spike of the loss is skipped, and its batches are left out",
        (
            "test_a_spike_is_more_than_sigma_deviations_above_the_mean",
            "test_the_update_of_a_spike_is_not_made",
            "test_a_run_goes_back_by_itself_and_leaves_the_batches_out",
        ),
    ),
    22: Case(
        "collapsed routers, empty experts, few tokens, all experts, no room, huge logits, ties",
        (
            "test_what_lasts_is_said_once_and_its_end_too",
            "test_routing_at_its_limits_is_finite_in_value_and_gradient",
            "test_every_kernel_equals_autodiff_of_the_reference",
            "test_ties_go_to_the_lowest_index",
        ),
    ),
    23: Case(
        "a batch without a valid token",
        ("test_a_batch_of_padding_alone_changes_nothing_but_by_weight_decay",),
    ),
    24: Case(
        "accumulation, remat, dropless, one device and custom gradients equal their references",
        (
            "test_accumulated_microbatches_equal_one_batch",
            "test_a_policy_changes_memory_but_neither_loss_nor_gradients",
            "test_with_room_for_all_capacity_equals_dropless",
            "test_the_fast_path_equals_the_reference_in_value_and_gradient",
            "test_eight_devices_give_the_losses_of_one",
            "test_gradients_are_the_slopes_of_the_value",
        ),
    ),
    25: Case(
        "upcycling: naive keeps the logits, drop keeps whole neurons, no expert depends on another",
        (
            "test_naive_upcycling_preserves_logits",
            "test_shared_indices_redraw_floor_of_ratio_whole_neurons",
            "test_an_expert_does_not_depend_on_how_many_others_there_are",
            "test_no_bit_depends_on_mesh_or_compilation_or_number_of_experts",
        ),
    ),
    26: Case(
        "damaged or empty data, long documents, token ids beyond the vocabulary, other tokenizers",
        (
            "test_damage_to_a_file_of_the_token_cache_is_made_anew_or_named",
            "test_a_flipped_bit_is_called_damage_or_lies_in_padding",
            "test_every_pair_is_seen_exactly_once_an_epoch",
            "test_the_largest_id_of_a_tokenizer_decides_not_the_number_of_its_tokens",
            "test_another_tokenizer_than_the_sources_is_refused_unless_it_is_asked_for",
        ),
    ),
    27: Case(
        "resumed within and across epochs; changed data keys are refused",
        (
            "test_batch_n_is_the_same_from_wherever_one_starts",
            "test_each_seed_and_epoch_has_an_order_of_its_own",
            "test_a_key_of_the_data_is_fixed_unless_it_says_otherwise",
        ),
    ),
    28: Case(
        "any number of hosts reads the same global batches",
        (
            "test_some_rows_of_a_batch_are_those_of_the_whole_batch",
            "test_two_processes_train_as_one_on_the_same_rows",
        ),
    ),
    29: Case("archives with ../ and links", reason="no command unpacks an archive into a folder"),
    30: Case(
        "the text of the run has changed: refused",
        (
            "test_a_run_does_not_go_on_with_a_text_that_changed_in_its_place",
            "test_a_text_that_changed_in_its_place_is_refused_by_its_split",
        ),
    ),
    31: Case("slow data is named", ("test_data_that_a_step_waits_for_is_named_once",)),
    32: Case(
        "a mistake in the config: one line and exit 2 before compilation",
        (
            "test_a_mistake_is_refused_in_one_line_before_anything_is_written",
            "test_the_command_line_says_it_in_under_two_seconds_and_exits_2",
        ),
    ),
    33: Case(
        "sweeps: names given twice, a failed run, finished runs",
        (
            "test_a_mistake_in_any_run_is_refused_before_the_first",
            "test_a_failed_run_ends_only_the_runs_that_start_from_it",
            "test_finished_runs_are_skipped_and_equal_work_is_done_once",
        ),
    ),
    34: Case(
        "no network, no accelerator",
        (
            "test_the_embedded_corpus_comes_whole_out_of_array_records",
            "test_a_backend_that_is_not_there_is_named_in_one_line",
            "test_a_back_end_that_is_not_there_is_refused",
        ),
    ),
    35: Case(
        "a back end for metrics that fails or hangs stops no run",
        (
            "test_rows_are_taken_at_once_the_end_comes_and_one_line_says_why",
            "test_a_fault_of_one_back_end_takes_no_row_from_the_others",
            "test_the_program_ends_without_waiting_for_a_library_that_hangs",
        ),
    ),
    36: Case(
        "out of memory is answered with settings that need less",
        ("test_too_little_memory_is_answered_with_the_settings_that_need_less",),
    ),
    37: Case(
        "a resumed run is bitwise the whole one, and eight devices give the losses of one",
        (INTERRUPTED, "test_eight_devices_give_the_losses_of_one"),
    ),
    38: Case("the same config compiles to the same program in every process", (INTERRUPTED,)),
    39: Case("the step compiles once", ("test_the_train_step_compiles_once",)),
    40: Case("memory is flat", ("test_memory_is_flat_and_the_step_compiles_once",)),
}


@pytest.fixture(scope="module")
def names():
    """The functions of all test files."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("test_*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_forty_cases():
    assert list(CASES) == list(range(1, 41))


@pytest.mark.parametrize("number", CASES)
def test_a_case_has_tests_that_exist_or_a_reason(number, names):
    case = CASES[number]
    assert set(case.tests) <= names
    assert bool(case.tests) != bool(case.reason)
