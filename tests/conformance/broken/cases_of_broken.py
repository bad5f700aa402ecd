"""The kit around each broken plugin; run by ``test_kit_catches.py`` in a process that has them installed."""

from camshaft.testing import Conformance


def case(plugin, kind="observer"):
    return type(f"Test_{plugin}", (Conformance,), {"plugin": plugin, "kind": kind})


Test_good = case("good")
Test_open_options = case("open_options")
Test_plans_by_rank = case("plans_by_rank")
Test_plans_by_turn = case("plans_by_turn")
Test_plans_with_torch = case("plans_with_torch")
Test_misspelt = case("misspelt")
Test_scales = case("scales", "reducer")
Test_writes = case("writes")
Test_forgets = case("forgets")
Test_leaves_hooks = case("leaves_hooks")
Test_leaves_threads = case("leaves_threads")
Test_calls_pluggy = case("calls_pluggy")
Test_one_rank = case("one_rank", "reducer")
Test_kernels_wrong = case("kernels_wrong", "kernel")
