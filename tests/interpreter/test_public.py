"""The public functions with Triton kernels behind them: tests of tests/ops, run once more in the interpreter."""

import pytest
from loading import module

pytestmark = pytest.mark.usefixtures("bfloat16_of_a_gpu")

#: By file of tests/ops the tests that are run here too: those of numbers that are special, and of small examples.
TESTS = {
    "aggregate": "peel_is_finite_and_decides_as_lse vote_is_a_majority",
    "apgd_step": "the_formula_by_hand the_point_before_counts",
    "diffusion_step": "the_noise_is_the_named_stream "
    "an_exact_prediction_gives_the_image_in_one_step learned_variances_lie_between_the_two "
    "the_gradient_of_the_prediction_has_its_layout both_ends_of_the_clip_pass_the_gradient nan",
    "gated_elu": "published_values far_out_nothing_is_lost",
    "hyperplane_projection": "gradients_of_any_size rows_without_a_plane_do_not_move",
    "noisy_replay": "published_mask the_test_is_strict_and_nan_does_not_replay noise_is_the_named_stream nan the_box",
    "pgd_step": "l1_moves_the_largest_gradients l1_leaves_what_is_in_the_ball_to_the_bit "
    "gradients_without_a_direction_move_nothing gradients_of_any_size_have_a_direction nan_in_the_image_propagates "
    "special_radii",
    "philox": "pinned_vector_of_each_stream any_split_gives_the_same_numbers",
    "random_transform": "gradient_of_the_clip results_of_any_dtype without_noise pinned_masks "
    "infinities_are_clipped_where_they_are_seen",
    "reconstruction_loss": "published_values saturated_logits_are_exact target_of_any_dtype_without_a_gradient",
    "representation_distance": "published_values published_gradient_and_loss where_the_student_is_the_teacher "
    "teacher_of_any_dtype zero_vectors non_finite_features_are_not_hidden "
    "from_the_smallest_to_the_largest_norms layers_are_as_one_by_one layers_of_several_precisions",
    "sample_latent": "published_divergence divergence_near_the_prior_keeps_its_gradient "
    "one_output_alone_has_a_gradient",
    "square_proposal": "an_edge_in_a_tensor_gives_the_same_bits",
    "stitch": "every_block_is_that_of_its_owner only_the_owner_is_read a_block_without_an_owner_is_zero",
    "contract": "any_layout_and_no_mutation a_sample_does_not_depend_on_its_batch empty_batches func_grad "
    "numbers_that_are_not_finite_reach_what_they_reach_in_the_definition",
}


for _file, _names in TESTS.items():
    _module = module("ops", _file)
    for _name in _names.split():
        globals()[f"test_{_file}_{_name}"] = getattr(_module, f"test_{_name}")
    if _file == "contract":
        FUNCTIONS = _module.FUNCTIONS


@pytest.fixture
def function(backend, name):
    return FUNCTIONS[name]
