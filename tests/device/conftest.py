"""The host twin's module, as every test of it finds it."""

import pytest
import twin


@pytest.fixture
def module():
    module = twin.load()
    yield module
    module.set_seed(0)
    module.set_processors(1)
    module.watch(True)
    module.ignore_barriers([])
    module.count_traffic(False)


@pytest.fixture
def unwatched(module):
    """What a schedule shows by itself, hazards being no errors."""
    module.watch(False)
    return module
