"""Tests of the tests: small faults in the scheduler, its pages and the rate limits are noticed."""

import pytest

from tests.serving.scheduling.mutator import Mutant, mutants, survives

_FOLDER = "tests/serving/scheduling"
_NAMES = "pages queue budget preemption scheduler partitions faults fairness answers"
# The tests by hand come first, because they are the quickest.
SCHEDULING = (*(f"{_FOLDER}/test_{name}.py" for name in _NAMES.split()), "-k", "not plain_python")
LIMITS = ("tests/serving/accounting/test_rate_limits.py",)
SECONDS = 120.0

# Survivors, and why no test can, or need, notice them.
_ROWS = "serving.scheduling.rows: "
_TAKES = (
    "may_take = not head.turn.rows and most_rows {} 1 or leading >= head.turn.level + "
    "preemption.LEAD or (self._num_batch > 0 and head.request.priority is not Priority.BATCH)"
)
_LEADING = "leading = max((s.turn.level for s in self.running if s.had_slice), default={})"
EXPLAINED = {
    f"{_ROWS}self._plans = 0 -> self._plans = 1": "plans are counted from any number",
    f"{_ROWS}self._stuck = (-1, 0, 0, 0) -> self._stuck = (-1, 0, 1, 0)": "no change is the -1st",
    f"{_ROWS}{_LEADING.format(0)} -> {_LEADING.format(1)}": "LEAD is more than 1 anyway",
    f"{_ROWS}{_TAKES.format('>')} -> {_TAKES.format('>=')}": "spares a search that finds nobody",
}


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    ("module", "tests"),
    [
        ("serving.scheduling.scheduler", SCHEDULING),
        ("serving.scheduling.queue", SCHEDULING),
        ("serving.scheduling.rows", SCHEDULING),
        ("serving.scheduling.preemption", SCHEDULING),
        ("serving.scheduling.budget", SCHEDULING),
        ("serving.scheduling.pages", SCHEDULING),
        ("serving.accounting.rate_limits", LIMITS),
    ],
)
def test_19_of_20_faults_are_noticed(module: str, tests: tuple[str, ...]) -> None:
    """The others are explained."""
    assert survives(None, tests, SECONDS), "the tests must pass on the code as it is"
    tried = mutants(module)
    survivors = [mutant for mutant in tried if survives(mutant, tests, SECONDS)]
    names = [mutant.build()[1] for mutant in survivors]
    assert [name for name in names if name not in EXPLAINED] == []
    assert len(survivors) <= len(tried) / 20


def test_a_mutant_has_one_fault() -> None:
    """A place, one line of the module; the same number is always the same place."""
    module = "serving.scheduling.budget"
    tried = mutants(module)
    changes = [mutant.build()[1] for mutant in tried]
    assert len(tried) > 20 and Mutant(module, 3).build()[1] == changes[3]
    for change in changes:
        before, after = change.removeprefix(f"{module}: ").split(" -> ")
        assert before != after
