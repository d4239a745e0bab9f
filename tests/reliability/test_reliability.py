"""The short form of the two scripts beside this file: nonsense and damage end in a line, never in silence."""

from __future__ import annotations

import damage
import fuzz
import pytest


def test_nonsense_is_refused_in_a_line():
    outcomes, tracebacks = fuzz.run(200)
    assert not tracebacks, "\n\n".join(tracebacks)
    for kind, counter in outcomes.items():
        assert counter[fuzz.REFUSED], f"no {kind} was refused: nothing was tried"
        assert counter[fuzz.ACCEPTED], f"no {kind} was accepted: all of it was nonsense"


@pytest.mark.slow
def test_damage_is_named_or_made_good(tmp_path):
    outcomes, failures = damage.run(16, 1, tmp_path)
    assert not failures, "\n\n".join(failures)
    assert outcomes["named"] + outcomes["fell back"]
