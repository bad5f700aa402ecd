"""The kit around each broken plugin; run by ``test_kit_catches.py`` in a process that has them installed."""

from camshaft.testing import Conformance


def case(plugin, kind="observer", **more):
    return type(f"Test_{plugin}", (Conformance,), {"plugin": plugin, "kind": kind, **more})


Test_good = case("good")
Test_open_options = case("open_options")
Test_plans_by_rank = case("plans_by_rank")
Test_plans_by_last_rank = case("plans_by_last_rank")
Test_plans_by_turn = case("plans_by_turn")
Test_plans_with_torch = case("plans_with_torch")
Test_misspelt = case("misspelt")
Test_scales = case("scales", "reducer")
Test_mislabelled = case("mislabelled")
Test_clips_alone = case("clips_alone")
Test_touches = case("touches")
Test_writes = case("writes")
Test_forgets = case("forgets")
Test_unsaved = case("unsaved", reference_lr=lambda self, step, total: 1 / (1 + step))
Test_saves_alone = case("saves_alone")
Test_one_rank_forgets = case("one_rank_forgets")
Test_saving_writes = case("saving_writes")
Test_hooks_everything = case("hooks_everything")
Test_changes_classes = case("changes_classes")
Test_leaves_hooks = case("leaves_hooks")
Test_leaves_threads = case("leaves_threads")
Test_calls_pluggy = case("calls_pluggy")
Test_calls_extra = case("calls_extra")
Test_one_rank = case("one_rank", "reducer")
Test_kernels_wrong = case("kernels_wrong", "kernel")
Test_kernels_of_sums = case("kernels_of_sums", "kernel")
Test_kernels_of_steps = case("kernels_of_steps", "kernel")
Test_kernels_of_ones_own = case("kernels_of_ones_own", "kernel")
