"""Mutants in what is written to files and read from them."""

from __future__ import annotations

from benchmarks.mutant import Mutant

FILES = (
    Mutant(
        "fxprune/files/container.py",
        'if _sum(value) != about.get("sum"):',
        "if False:",
        "a tensor's checksum is not looked at",
        "tests/files/test_load.py::test_a_bit_that_is_another_is_seen_in_every_part",
    ),
    Mutant(
        "fxprune/files/conditions.py",
        "if not is_arithmetic(condition):",
        "if False:",
        "a condition of a file may be any Python",
        "tests/files/test_load.py::test_what_is_not_to_be_trusted_is_refused",
    ),
    Mutant(
        "fxprune/files/conditions.py",
        "return isinstance(right, ast.Constant) and right.value in range(_MOST_EXPONENT + 1)",
        "return True",
        "a condition of a file may compute without end",
        "tests/files/test_load.py::test_what_is_no_arithmetic_is_seen",
    ),
    Mutant(
        "fxprune/files/ops.py",
        "if packet in _FORBIDDEN or is_unsafe",
        "if is_unsafe",
        "a graph of a file may open files",
        "tests/files/test_load.py::test_what_is_not_to_be_trusted_is_refused",
    ),
    Mutant(
        "fxprune/files/ops.py",
        "if space not in (*OWN, *trusted):",
        "if False:",
        "a file decides whose operators run",
        "tests/files/test_load.py::test_operators_of_others_are_taken_on_trust_alone",
    ),
    Mutant(
        "fxprune/files/load.py",
        "validate(root, graph)",
        "str(root)",
        "packed weights of a file are taken on trust",
        "tests/files/test_trust.py::test_a_changed_packed_weight_is_refused",
    ),
    Mutant(
        "fxprune/files/trust/segments.py",
        "if int(seen.sum()) != len(order):",
        "if False:",
        "a row may stand twice, and another not at all",
        "tests/files/test_trust.py::test_a_changed_net_is_refused",
    ),
    Mutant(
        "fxprune/files/trust/validate.py",
        "_refuse_other_readers(root, graph, packed)",
        "str(packed)",
        "an op of a file may write to packed weights",
        "tests/files/test_trust.py::test_a_packed_weight_that_another_op_could_write_to_is_refused",
    ),
    Mutant(
        "fxprune/files/modules.py",
        "module = nn.Module().train(bool(data",
        "module = nn.Module().train(bool(not data",
        "a loaded result is in another mode",
        "tests/files/test_save.py::test_a_trainable_result_switches_its_mode_and_trains_on",
    ),
    Mutant(
        "fxprune/files/packaged.py",
        'if _sum(package) != made.get("sha256"):',
        "if False:",
        "code that was put in place of the saved one is run",
        "tests/files/test_packaged.py::test_code_that_is_not_for_here_is_not_run",
    ),
)
