"""Mutants in what is handed out, and what is fitted to data."""

from __future__ import annotations

from benchmarks.mutant import Mutant

LOWER = (
    Mutant(
        "fxprune/lower/fold.py",
        "(old_bias.double() - mean.double()) * scale",
        "(old_bias.double() + mean.double()) * scale",
        "a folded batch-norm adds its mean",
        "tests/lower/test_fold.py::test_a_batch_norm_goes_into_its_convolution",
    ),
    Mutant(
        "fxprune/lower/fold.py",
        "return sum(len(read.users) for read in reads) == 1",
        "return bool(reads)",
        "a batch-norm goes into a weight that others read",
        "tests/lower/test_fold.py::test_what_others_read_stays_right",
    ),
    Mutant(
        "fxprune/lower/fold.py",
        "aliases = [n for n, first in canonical.items() if first == name]",
        "aliases = [name]",
        "a tied weight is masked under one name alone",
        "tests/lower/test_fold.py::test_masks_become_positive_zeros_under_every_name",
    ),
    Mutant(
        "fxprune/lower/lower.py",
        "if len(node.users) != 1:",
        "if not node.users:",
        "an activation beside another reader goes into the kernel",
        "tests/lower/test_lower.py::test_an_activation_beside_another_reader_stays",
    ),
    Mutant(
        "fxprune/lower/lower.py",
        "if len({u.transposed for u in weight_uses}) > 1:",
        "if len({u.transposed for u in weight_uses}) > 2:",
        "a weight that is used in two ways is packed for one",
        "tests/lower/test_lower.py::test_uses_that_keep_a_weight_dense",
    ),
    Mutant(
        "fxprune/lower/lower.py",
        "tokens=tuple(tokens),",
        "tokens=tuple(tokens[:1]),",
        "a layout is chosen for the smallest size alone",
        "tests/lower/test_lower.py::test_a_site_is_asked_about_at_the_rows_it_will_see",
    ),
    Mutant(
        "fxprune/lower/layouts/choose.py",
        "and min(gains[name]) >= 1.0}",
        "and max(gains[name]) >= 1.0}",
        "a layout is taken that loses at one of the sizes",
        "tests/lower/test_choose.py::test_a_layout_that_loses_at_one_size_is_refused",
    ),
    Mutant(
        "fxprune/lower/layouts/choose.py",
        "if mean >= MARGIN and min",
        "if mean >= 1 / MARGIN and min",
        "a layout is taken that is no faster",
        "tests/lower/test_choose.py::test_a_layout_that_hardly_wins_is_refused",
    ),
    Mutant(
        "fxprune/lower/layouts/choose.py",
        "baseline = min(samples[: len(dense)])",
        "baseline = max(samples[: len(dense)])",
        "a layout is held against the slower dense form",
        "tests/lower/test_choose.py::test_the_faster_dense_form_is_what_a_layout_must_beat",
    ),
    Mutant(
        "fxprune/lower/layouts/choose.py",
        "round(kept * 50), site.tokens,",
        "round(kept * 50),",
        "what was measured at some sizes is used for others",
        "tests/lower/test_choose.py::test_what_was_measured_at_other_sizes_is_not_reused",
    ),
    Mutant(
        "fxprune/lower/layouts/choose.py",
        "return [samples.typical if warm else samples.alone",
        "return [samples.alone if warm else samples.typical",
        "layers are timed with the caches that they do not find",
        "tests/lower/test_choose.py::test_a_layer_is_timed_with_its_weights_in_the_cache_where_the_whole_model_fits",
    ),
)

MEASURE = (
    Mutant(
        "fxprune/measure/timing.py",
        "cold, warm = timer(function)",
        "cold, warm = timer(functions[0])",
        "everything is timed as the first function",
        "tests/measure/test_measure.py::test_each_function_is_timed_as_itself",
    ),
    Mutant(
        "fxprune/measure/timing.py",
        "return between - start, (clock() - between) / repeats",
        "return between - start, clock() - between",
        "a call takes as long as all its repetitions",
        "tests/measure/test_measure.py::test_a_fast_function_is_repeated_and_its_time_is_that_of_one_call",
    ),
    Mutant(
        "fxprune/measure/timing.py",
        "return median(self.warm)",
        "return max(self.warm)",
        "one interruption decides",
        "tests/measure/test_measure.py::test_one_slow_round_decides_nothing",
    ),
    Mutant(
        "fxprune/measure/race.py",
        "if new.typical < old.typical:",
        "if new.typical > old.typical:",
        "the slower way of the user's model is taken for its best",
        "tests/measure/test_measure.py::test_a_race_is_won_by_the_fastest_and_tells_who_did_not_run",
    ),
    Mutant(
        "fxprune/measure/race.py",
        "if max(first.typical, second.typical) < _CLEAR * min(first.typical, second.typical):",
        "if max(first.typical, second.typical) > _CLEAR * min(first.typical, second.typical):",
        "a close duel is decided by a first look",
        "tests/measure/test_measure.py::test_a_duel_that_is_close_is_fought_longer",
    ),
    Mutant(
        "fxprune/measure/ways.py",
        "torch._inductor.config.patch(freezing=True)",
        "torch._inductor.config.patch(freezing=False)",
        "the user's frozen model is not frozen",
        "tests/measure/test_measure.py::test_a_frozen_model_is_frozen",
    ),
    Mutant(
        "fxprune/measure/ways.py",
        "twin = copied(model).to(memory_format",
        "twin = model.to(memory_format",
        "the user's own weights change their layout",
        "tests/measure/test_measure.py::test_channels_last_is_of_a_copy_also_where_a_hook_computes_the_weight",
    ),
)

EMIT = (
    Mutant(
        "fxprune/emit/trial.py",
        "if best is None or self._is_faster(found, best):",
        "if best is None:",
        "a slower packed model is kept",
        "tests/emit/test_deliver.py::test_a_slower_packed_model_is_not_kept",
    ),
    Mutant(
        "fxprune/emit/trial.py",
        "for rows in (expected.result, expected.at_other_sizes) if",
        "for rows in (expected.result,) if",
        "the result is not looked at at the second size",
        "tests/emit/test_deliver.py::test_a_form_whose_code_is_wrong_at_the_second_size_is_not_emitted",
    ),
    Mutant(
        "fxprune/emit/trial.py",
        "if timing.ratio >= 1.0:",
        "if timing.ratio >= 0.1:",
        "other forms are not tried where the user's model is faster",
        "tests/emit/test_deliver.py::test_other_forms_are_tried_where_the_users_model_is_faster",
    ),
    Mutant(
        "fxprune/emit/trial.py",
        "own_storage(program, self._theirs)",
        "own_storage(program, set())",
        "a result holds the user's own weights",
        "tests/transform/test_calls.py::test_the_result_does_not_follow_the_users_model",
    ),
    Mutant(
        "fxprune/emit/deliver.py",
        "rows = [*expected.result(result), *expected.at_other_sizes(result)] if",
        "rows = [*expected.result(result)] if",
        "a result that trains is not looked at at the second size",
        "tests/emit/test_deliver.py::test_a_result_that_trains_is_held_at_the_second_size_too",
    ),
    Mutant(
        "fxprune/emit/deliver.py",
        "return dataclasses.replace(w, choice=choice, bytes=w.dense_bytes)",
        "return dataclasses.replace(w, choice=choice)",
        "a dense weight is reported with the bytes of a packed one",
        "tests/emit/test_deliver.py::test_a_slower_packed_model_is_not_kept",
    ),
    Mutant(
        "fxprune/emit/compiled.py",
        "if row.ok and program.fits(inputs):",
        "if program.fits(inputs):",
        "code for another size is used unverified",
        "tests/emit/test_compiled.py::test_code_that_is_wrong_at_another_size_is_never_used",
    ),
    Mutant(
        "fxprune/emit/compiled.py",
        'conditions.append(f"{a}.is_contiguous()" if fake.is_contiguous() else strides)',
        'conditions.append("True" if fake.is_contiguous() else strides)',
        "code for contiguous inputs is given others",
        "tests/emit/test_compiled.py::test_inputs_in_other_strides_are_right_and_cost_no_program",
    ),
    Mutant(
        "fxprune/emit/compiled.py",
        'conditions.append(f"({guards})")',
        'conditions.append("True")',
        "code is used at sizes that Inductor ruled out",
        "tests/emit/test_compiled.py::test_every_size_that_is_let_in_is_right_and_one_program_serves_most",
    ),
    Mutant(
        "fxprune/emit/pruned.py",
        "super()._load_from_state_dict(*args, **kwargs)",
        "return super()._load_from_state_dict(*args, **kwargs)",
        "code holds the weights that were there before others were loaded",
        "tests/emit/test_compiled.py::test_weights_that_change_by_torchs_own_means_are_seen[load]",
    ),
    Mutant(
        "fxprune/emit/pruned.py",
        "torch._C._set_grad_enabled(True)",
        "torch._C._set_grad_enabled(False)",
        "a call leaves gradients off",
        "tests/emit/test_compiled.py::test_a_call_follows_neither_autocast_nor_gradients_outside",
    ),
    Mutant(
        "fxprune/emit/trainable/masks.py",
        "parameter.data = parameter.detach().masked_fill(~keep, 0)",
        "parameter.data = parameter.detach()",
        "what is masked is not zero in the parameter",
        "tests/emit/test_trainable.py::test_masked_weights_stay_zero",
    ),
    Mutant(
        "fxprune/emit/trainable/module.py",
        "value = value.clone() if shared or partial or value.is_inference() else value",
        "value = value.clone() if partial or value.is_inference() else value",
        "training the result trains the user's model",
        "tests/emit/test_trainable.py::test_the_users_model_is_not_touched",
    ),
    Mutant(
        "fxprune/emit/trainable/module.py",
        "return 1.0 / float(counter) if training else 0.0",
        "return 1.0 / (float(counter) + 1) if training else 0.0",
        "a mean over batches counts one too many",
        "tests/emit/test_trainable_modes.py::test_both_modes_compute_what_the_models_do[batch norm over all batches]",
    ),
    Mutant(
        "fxprune/emit/trainable/module.py",
        "detached = graph.call_function(aten.detach.default, (node,))",
        "detached = graph.call_function(aten.clone.default, (node,))",
        "gradients go where the model stops them",
        "tests/emit/test_trainable_steps.py::test_gradients_stop_where_the_model_stops_them",
    ),
)

BACKEND = (
    Mutant(
        "fxprune/backend.py",
        "if entry is None or not self._is_current(entry, inputs):",
        "if entry is None:",
        "weights that were written to are not packed anew",
        "tests/test_backend.py::test_whoever_writes_to_weights_is_seen",
    ),
    Mutant(
        "fxprune/backend.py",
        "return tuple(tensor.shape), fingerprint(tensor)",
        "return tuple(tensor.shape), tensor._version",
        "what is written through .data is not seen",
        "tests/test_backend.py::test_whoever_writes_to_weights_is_seen[c.weight-data]",
    ),
    Mutant(
        "fxprune/backend.py",
        "if floats != self._floats:",
        "if len(floats) != len(self._floats):",
        "a call computes with the number of an earlier one",
        "tests/test_backend_numbers.py::test_a_number_that_each_call_gives_is_followed",
    ),
)

CALIBRATION = (
    Mutant(
        "fxprune/calibration/solvers/least_squares.py",
        "part.diagonal(dim1=-2, dim2=-1).add_(~used)",
        "part.diagonal(dim1=-2, dim2=-1).add_(1)",
        "least squares is damped by one",
        "tests/calibration/test_calibrate_solvers.py::test_least_squares_directly",
    ),
    Mutant(
        "fxprune/calibration/solvers/least_squares.py",
        "residual = residual - length * moved",
        "residual = residual - moved",
        "conjugate gradients step by another length than they count",
        "tests/calibration/test_calibrate_solvers.py::test_least_squares_by_conjugate_gradients",
    ),
    Mutant(
        "fxprune/calibration/solvers/units.py",
        "weight = weight - torch.cholesky_solve(weight[:, columns].mT, part).mT @ inverse[columns]",
        "weight = weight + torch.cholesky_solve(weight[:, columns].mT, part).mT @ inverse[columns]",
        "what is left makes up for the wrong sign",
        "tests/calibration/test_calibrate_obs.py::test_units_leave_one_by_one_each_time_the_cheapest",
    ),
    Mutant(
        "fxprune/calibration/moments.py",
        "return self.gram - (self.count * off.unsqueeze(-1)",
        "return self.gram + (self.count * off.unsqueeze(-1)",
        "a Gram matrix is centred the wrong way",
        "tests/calibration/test_calibrate_unfold.py::test_moments_do_not_depend_on_the_cut",
    ),
    Mutant(
        "fxprune/calibration/layer.py",
        "shift = Shift(mean, -1) if mean in vectors else None",
        "shift = Shift(mean) if mean in vectors else None",
        "a shift goes into a running mean with the wrong sign",
        "tests/calibration/test_calibrate_models.py::test_a_batch_norm_takes_the_shift_and_its_variance",
    ),
    Mutant(
        "fxprune/calibration/solvers/problem.py",
        ".square().sum((-2, -1)) - varying",
        ".square().sum((-2, -1))",
        "few rows are shrunk too little, for inputs count as correlated with themselves",
        "tests/calibration/test_shrinkage.py::test_shrinkage_is_its_formula",
    ),
)
