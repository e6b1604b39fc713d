"""What holds for the whole suite."""

import gc

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The long ones first: a worker that starts one last leaves the other idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What the imports made stays: looking at it anew in every full collection is a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """Models that are made from GGUF files are kept in a folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
