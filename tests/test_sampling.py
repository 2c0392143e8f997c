import pytest

from tests.sampling import chosen

pytest_plugins = ["pytester"]

CASES = [(op, dtype, backend) for op in range(14) for dtype in ("fp32", "bf16", "fp64") for backend in ("reference", "cpu")]


@pytest.mark.parametrize("n", [14, 24, 83])
def test_every_value_of_every_parameter_is_met(n):
    taken = chosen("test_values", CASES, n)
    assert len(taken) == len(set(taken)) == n
    assert taken == sorted(taken)
    for place in range(3):
        assert {CASES[i][place] for i in taken} == {case[place] for case in CASES}


def test_few_cases_all_run_and_a_name_chooses_the_same_again():
    assert chosen("test_values", CASES[:5], 24) == [0, 1, 2, 3, 4]
    assert chosen("test_values", CASES, 24) == chosen("test_values", CASES, 24) != chosen("test_others", CASES, 24)
    assert len(chosen("test_values", CASES, 3)) == 3


def test_the_option_says_what_it_left_out(pytester):
    pytester.makeconftest("from tests.conftest import *")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("value", range(10))
        def test_value(value):
            assert value >= 0

        def test_alone():
            pass

        @pytest.mark.each
        @pytest.mark.parametrize("value", range(5))
        def test_each(value):
            pass
        """
    )
    pytester.makeini("[pytest]\nmarkers = each: all of it")
    result = pytester.runpytest_inprocess("--sample", "3", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=9)
    result.stdout.fnmatch_lines(["--sample 3: 7 further cases*make test-full*"])


def test_parts_share_out_the_tests_and_stop_in_time(pytester):
    pytester.makeconftest("from tests.conftest import *")
    pytester.makepyfile("import pytest\n\n@pytest.mark.parametrize('value', range(7))\ndef test_value(value):\n    pass")
    for part, count in (("1/3", 3), ("2/3", 2), ("3/3", 2)):
        pytester.runpytest_inprocess("--part", part, "-p", "no:cacheprovider").assert_outcomes(passed=count)
    late = pytester.runpytest_inprocess("--seconds", "0", "-rs", "-p", "no:cacheprovider")
    late.assert_outcomes(skipped=7)
    late.stdout.fnmatch_lines(["*no time was left*"])
