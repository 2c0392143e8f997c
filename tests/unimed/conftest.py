import pytest


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    """The built-in sample, built once for all tests that read it."""
    from unimed.data.sample import build_sample

    folder = tmp_path_factory.mktemp("data") / "sample"
    build_sample(folder)
    return folder
