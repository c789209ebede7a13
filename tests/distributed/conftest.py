import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pools():
    """Pool by number of ranks, started on first use."""
    started = {}

    def get(world_size: int) -> Pool:
        if world_size not in started:
            started[world_size] = Pool(world_size)
        return started[world_size]

    yield get
    for pool in started.values():
        pool.close()
