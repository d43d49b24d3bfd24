"""The tally that each part of the attack keeps."""

import collections

import pytest


@pytest.fixture(scope="module")
def counts():
    """What became of the cases, printed at the end."""
    found = collections.Counter()
    yield found
    print("\n" + "\n".join(f"{kind}: {number}" for kind, number in sorted(found.items())))
