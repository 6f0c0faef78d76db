"""The table of planted faults, ``faults/*.toml`` by room, and the properties that must tell of them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

_MIXED = "adapters/test_matrix.py::test_every_row_of_a_mixed_batch_answers_as_peft_does"
_SENTENCES = "auto/test_sentence_folders.py"
PROPERTIES = {
    "P2 saved": "properties/test_modules.py::test_p1_p2_saving_and_loading_is_the_identity",
    "P1 text": "properties/test_modules.py::test_p1_every_change_shows_in_the_text",
    "P4 verifier": "properties/test_modules.py::test_p4_damage_is_told_with_its_code",
    "P5 word": "properties/test_modules.py::test_p5_p8_p9_every_pass_keeps_its_word",
    "P5 shapes": "properties/test_shapes.py",
    "P6 transaction": "properties/test_modules.py::test_p6_a_pass_that_fails_leaves_the_module_alone",
    "P7 sites": "properties/test_modules.py::test_p7_passes_fire_at_every_planted_site",
    "P7 near misses": "properties/test_modules.py::test_p7_near_misses_are_left_alone_and_reported",
    "P10 passes": "properties/test_numbers.py::test_p10_every_pass_keeps_its_numeric_promise",
    "P10 frontend": "properties/test_frontend.py::test_p10_drawn_configurations_answer_as_transformers",
    "P11 packages": "properties/test_numbers.py::test_p11_packages_answer_as_the_recipe_however_the_request_is_cut",
    "P11 driver": "properties/test_driver.py::TestRequests",
    "P12 rows": "properties/test_numbers.py::test_p12_rows_do_not_know_of_each_other",
    "P12 adapters": "properties/test_adapters.py::test_p12_rows_answer_with_their_own_adapter",
    "P16 engines": "properties/test_engine.py",
    "P13 orders": "properties/test_numbers.py::test_p13_legal_orders_answer_alike",
    "P14 sequences": "properties/test_numbers.py::test_p14_any_sequence_of_passes_is_refused_or_right",
    "P15 targets": "properties/test_numbers.py::test_p15_both_targets_have_one_interface",
    "codes": "properties/test_lowbit.py",
    "weights of few bits": "test_low_bits.py",
    "caches of 8 bits": "backends/test_kv_cache.py",
    "slots": "properties/test_cache_ops.py",
    "windows": "properties/test_visibility.py",
    "guards": "passes/test_guards.py",
    "ports": "ir/test_ports.py",
    "sources": "ir/test_sources.py",
    "expectations": "passing/test_expect.py",
    "inference": "passing/test_inference.py",
    "numbers of each pass": "debug/test_equivalence.py",
    "reports": "debug/test_report.py",
    "reductions": "debug/test_reduce.py",
    "first differences": "debug/test_first_difference.py",
    "bisections": "debug/test_bisect.py",
    "decoders": "runtime/test_decoder.py",
    "packed attention": "passes/test_ort_packed_attention.py",
    "fused products": "passes/test_fuse_products.py",
    "files of others": "debug/test_plain.py",
    "GGUF": "frontend/test_gguf.py",
    "prompts over slots": "auto/test_slots.py",
    "rows of token ids": "auto/test_generate_batch.py",
    "engines": "runtime/test_engine.py",
    "sampling of jobs": "runtime/test_sampling.py",
    "drift": "debug/test_drift.py",
    "fast packages": "cli/test_commands.py::test_verify_tells_the_drift_of_what_is_fast_and_proves_nothing",
    "node counts": "passes/test_node_counts.py",
    "refusals": "passes/test_refusals.py",
    "refused models": "frontend/test_refusals.py",
    "Auto classes": "auto/test_adapters.py",
    "AI 100 device": "backends/ai100/test_device.py",
    "AI 100 device rules": "backends/ai100/test_device_rules.py",
    "types of 16 bits": "test_dtypes.py",
    "AI 100 row rules": "backends/ai100/test_row_rules.py",
    "AI 100 rows": "backends/ai100/test_contract_rows.py",
    "rows of caches": "test_continuous_batching.py",
    "texts of passes": "passes/test_texts.py",
    "AI 100 emulator": "backends/ai100/test_emulator.py",
    "AI 100 compiler": "backends/ai100/test_compile.py",
    "AI 100 contract": "backends/ai100/test_contract.py",
    "AI 100 flags": "backends/ai100/test_flags.py",
    "AI 100 weight-free": "backends/ai100/test_weight_free.py",
    "reading": "test_reading.py",
    "cost": "test_cost.py",
    "merged adapters": "adapters/test_matrix.py::test_a_merged_adapter_answers_as_peft_does",
    "adapters of llama": f"{_MIXED}[llama-onnxruntime]",
    "adapters of bloom": f"{_MIXED}[bloom-onnxruntime]",
    "adapters that are loaded": "auto/test_adapters.py::test_what_is_left_open_fits_all_that_is_loaded",
    "adapters in blocks": "auto/test_adapters.py::test_what_a_block_without_adapters_changes_stays_as_in_peft",
    "scores of adapters": "auto/test_adapters.py::test_scores_are_those_of_each_rows_adapter",
    "AI 100 SDK": "backends/ai100/test_sdk.py",
    "drawn tokens": "passes/test_sampling.py",
    "drawn answers": "runtime/test_drawing.py",
    "AI 100 draws": "backends/ai100/test_sampling.py",
    "filled context": "runtime/test_generate.py::test_the_context_can_be_filled_to_the_last_token",
    "lengths of requests": "runtime/test_request.py::test_a_length_of_the_caller_is_not_cut",
    "slots of rows": "runtime/test_wrong_calls.py::test_slots_that_are_not_there",
    "several answers": "runtime/test_generate.py::test_several_answers_to_each_of_several_prompts",
    "texts": "runtime/test_texts.py",
    "served texts": "serve/test_text.py",
    "served requests": "serve/test_limits.py",
    "served answers": "serve/test_generation.py",
    "answers of a form": "serve/test_guided.py",
    "served embeddings": "serve/test_embeddings.py",
    "served adapters": "serve/test_adapters.py",
    "encoder inputs": "auto/test_forward.py::test_all_tokens_and_masks_of_truth_values_are_known",
    "texts of sentence models": f"{_SENTENCES}::test_texts_are_prepared_as_the_library_does_it[onnxruntime]",
    "modules of sentence models": f"{_SENTENCES}::test_all_modules_take_part[dense-onnxruntime]",
    "longest texts": f"{_SENTENCES}::test_the_longest_text_is_the_librarys",
    "poolings of sentence models": f"{_SENTENCES}::test_only_marked_tokens_count_before_linear_layers",
    "checkpoints": "frontend/test_loaders.py::test_both_load_the_same_or_refuse",
    "two tensors": "frontend/test_loaders.py::test_two_tensors_are_compared_up_to_the_first_difference",
    "code of a folder": "frontend/test_weights.py::test_code_that_may_run_is_part_of_what_a_folder_is",
    "packages": "test_package.py",
    "modules": "ir/test_module.py::test_another_version_is_refused",
    "symbols without a size": "ir/test_module.py::test_a_symbol_that_the_module_does_not_have_gets_no_size",
    "true shapes": "passes/test_stock_passes.py::test_every_declared_shape_is_the_true_one_with_rings_of_two_lengths",
    "types of values": "passes/test_stock_passes.py::test_every_value_has_a_type_and_a_number_of_axes",
    "differences of modules": "debug/test_diff.py",
    "sizes of phases": "ir/test_module.py::test_a_symbol_gets_its_sizes_in_each_phase",
    "phases of runs": "ir/test_module.py::test_phases_of_a_decoder",
    "sharing": "test_sharing.py::test_holes_are_not_written",
    "results of qeff opt": "cli/test_opt_writing.py",
    "rotations of tokens": "passes/test_rotary_of_tokens.py",
    "weights of 16 bits": "test_halves.py",
    "weights in blocks": "test_quantized.py",
    "files of flags": "test_compiler.py::test_another_file_of_a_flag_is_another_package",
    "flags of the command line": "cli/test_flags.py",
    "interrupts in finalizers": "cli/test_bad_input.py::test_an_interrupt_in_a_finalizer_is_heeded",
    "interrupts of the command line": "cli/test_bad_input.py::test_an_interrupt_that_a_library_turns_into_an_error",
    "sampling from the command line": "cli/test_commands.py::test_a_seed_alone_asks_for_samples",
    "options beside a package": "cli/test_bad_input.py::test_run_refuses",
    "qeff embed": "cli/test_embed.py",
    "encoder-decoders on the command line": "cli/test_encoded.py",
    "operators of others": "examples/test_swiglu_operator.py",
    "options of targets": "test_target_options.py",
    "programs": "examples/test_two_programs.py",
    "edits of pipelines": "passing/test_editing.py",
    "derived weights": "passes/test_fuse_products.py",
    "races": "benchmarks/test_peers.py",
    "standings of races": "benchmarks/test_harness.py::test_who_is_ahead_is_told",
    "lengths of caches": "passes/test_compute_context_length.py",
    "speculation": "runtime/test_speculation.py",
    "drafts that are refused": "passes/test_last_logits.py::test_drafts_as_long_as_a_prefill_run_are_refused",
    "drafts that go back": "passes/test_last_logits.py::test_a_model_that_cannot_go_back_decodes_one_token_at_a_time",
    "lengths that are told": "passes/test_compute_context_length.py::test_a_run_takes_the_shortest_length_that_it_fits",
    "packages of one phase": "test_requested_passes.py::test_a_prefill_hands_its_caches_to_a_decoder",
    "prefixes of caches": "test_requested_passes.py::test_states_of_a_recurrence_have_the_prefix_and_adapters_none",
    "options of decoders": "test_requested_passes.py::test_what_cannot_be_is_told",
    "rules for lengths": "test_read_lengths.py",
    "arguments of the incumbent": "auto/test_compile_arguments.py",
    "drafts": "passes/test_last_logits.py",
    "passes of others together": "examples/test_all_together.py",
    "copied heads": "passes/test_replicate_kv_heads.py",
    "attention in blocks": "passes/test_blocked_attention.py",
    "baked adapters": "adapters/test_baked.py",
    "layouts": "passing/test_manager.py::test_a_layout_is_a_property_that_can_be_required",
    "garbage": "test_garbage.py",
    "kit": "examples/test_kit.py",
    "AI 100 QNN": "backends/ai100/test_qnn.py",
    "sizes of images": "auto/test_forward.py::test_the_height_of_an_image_comes_before_its_width",
    "pictures and text": "test_image_text.py",
    "host embeddings of pictures": "test_image_text.py::test_the_host_looks_up_the_tokens",
    "tokens and their pictures": "test_image_text.py::test_tokens_have_their_pictures_by_either_name",
    "what pictures cannot be compiled for": "test_image_text.py::test_what_cannot_be_compiled_is_told",
    "rerankers of pictures": "auto/test_picture_embedding.py::test_a_reranker_of_pictures_and_text",
    "embedders without a head": "auto/test_picture_embedding.py::test_a_folder_needs_no_head",
    "videos": "test_videos.py",
    "families of pictures": "test_families.py",
    "embeddings of pictures": "auto/test_picture_embedding.py",
    "pictures of several sizes": "test_picture_sizes.py",
    "pictures of quantized models": "test_quantized_pictures.py",
    "one program for pictures": "test_single_program.py",
    "AI 100 one program for pictures": "backends/ai100/test_single_program.py",
    "adapters of pictures and text": "auto/test_adapted_pictures.py",
    "programs of pictures and text": "test_picture_programs.py",
    "followed answers": "cli/test_verify_pictures.py",
    "pictures are verified": "cli/test_pictures.py::test_verify_asks_about_pictures",
    "pictures on the command line": "cli/test_pictures.py",
    "picture forms": "runtime/test_picture_forms.py",
    "sizes of pictures": "auto/test_picture_sizes.py",
    "AI 100 pictures": "backends/ai100/test_pictures.py",
    "segments": "frontend/test_segments.py",
    "encoders": "frontend/test_encoders.py",
    "experts in a loop": "frontend/test_experts.py",
    "positions of a model": "frontend/test_positions.py",
    "encoders and decoders": "test_seq2seq.py",
    "AI 100 encoders and decoders": "backends/ai100/test_seq2seq.py",
    "pictures in prompts": "frontend/test_pictures.py",
    "parts of models": "test_image_text.py::test_of_a_model_that_also_speaks_what_answers_in_text_is_taken",
    "sounds beside pictures": "frontend/test_pictures.py::test_sounds_of_a_model_of_pictures_are_given_to_its_encoder",
    "what stands beside pictures": "benchmarks/test_coverage_pictures.py::test_a_model_answers_as_transformers"
    "[image-text-to-text-ovis2]",
    "experts of pictures": "benchmarks/test_coverage_pictures.py::test_a_model_answers_as_transformers"
    "[image-text-to-text-ernie4_5_vl_moe]",
    "cache layers": "frontend/test_states.py",
    "FP8": "frontend/formats/test_fp8.py",
    "weights of AWQ": "frontend/formats/test_awq.py::test_the_weights_are_those_of_the_definition",
    "answers of AWQ": "frontend/formats/test_awq.py::test_a_checkpoint_answers_as_transformers[qwen2]",
    "experts of AWQ": "frontend/formats/test_awq.py::test_experts_are_stacked_as_codes",
    "kinds of AWQ": "frontend/formats/test_awq.py::test_what_is_not_read_is_refused_by_name",
    "tensors of AWQ": "frontend/formats/test_awq.py::test_tensors_that_do_not_fit_are_refused",
    "weights of GPTQ": "frontend/formats/test_gptq.py::test_the_weights_are_those_of_the_definition",
    "sorted inputs of GPTQ": "frontend/formats/test_gptq.py::test_inputs_of_a_group_need_not_be_neighbors",
    "zeros of GPTQ": "frontend/formats/test_gptq.py::test_zeros_that_mean_two_things_are_refused",
    "Conv1D of GPTQ": "frontend/formats/test_gptq.py::test_layers_that_are_the_other_way_round_are_refused",
    "tensors of GPTQ": "frontend/formats/test_gptq.py::test_tensors_that_do_not_fit_are_refused",
    "compressed-tensors": "frontend/formats/test_compressed_tensors.py",
    "MXFP4": "frontend/formats/test_mxfp4.py",
    "coverage of pictures": "benchmarks/test_coverage_pictures.py",
    "demo of pictures": "cli/test_demo_pictures.py",
}
"""The columns of the table, each a test or a file of them below ``tests``."""


@dataclass(frozen=True)
class Fault:
    """One edit, see `tests.kill.edit`.

    Attributes:
        name: What is wrong.
        where: The module, class or function, as much of its dotted path as tells it from others.
        old: The expression or statements that stand there just once.
        new: What to put in their place.
        by: Property that must tell.
        room: Name of the file of the table.
    """

    name: str
    where: str
    old: str
    new: str
    by: str
    room: str


def read_faults() -> list[Fault]:
    """Every fault of the table."""
    found: list[Fault] = []
    for path in sorted(Path(__file__).with_name("faults").glob("*.toml")):
        found += [Fault(**entry, room=path.stem) for entry in tomllib.loads(path.read_text())["fault"]]
    return found


FAULTS = read_faults()
